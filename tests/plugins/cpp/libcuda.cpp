// A driver without a GPU: it writes what it is asked to launch, one JSON object a line. "Code" is a kernel's list of arguments.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

namespace {

struct Function {
    std::string name, arguments;
};

int number(char const* variable, int otherwise) {
    char const* text = std::getenv(variable);
    return text ? std::atoi(text) : otherwise;
}

std::string shown(void* argument, char kind) {
    if (kind == 'p') return std::to_string(*static_cast<std::uint64_t*>(argument));
    if (kind == 'i') return std::to_string(*static_cast<std::int32_t*>(argument));
    if (kind == 'l') return std::to_string(*static_cast<std::int64_t*>(argument));
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", double(*static_cast<float*>(argument)));
    return text;
}

}  // namespace

extern "C" {

int cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(1), 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    int const capability = number("CAPABILITY", 89);
    return *value = attribute == 75 ? capability / 10 : capability % 10, 0;
}
int cuModuleLoadData(void** module, void const* code) { return *module = const_cast<void*>(code), number("FAILS", 0); }
int cuModuleGetFunction(void** function, void* module, char const* name) {
    std::printf("{\"loaded\": \"%s\"}\n", name);
    *function = new Function{name, static_cast<char const*>(module)};
    return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned shared, void* stream,
                   void** arguments, void**) {
    auto const* const called = static_cast<Function*>(function);
    std::printf("{\"kernel\": \"%s\", \"programs\": %u, \"threads\": %u, \"shared\": %u, \"stream\": %zu, \"arguments\": {", called->name.c_str(),
                x, threads, shared, reinterpret_cast<std::size_t>(stream));
    std::istringstream names(called->arguments);
    int i = 0;
    for (std::string argument; names >> argument; ++i)
        std::printf("%s\"%s\": %s", i ? ", " : "", argument.substr(0, argument.size() - 2).c_str(),
                    shown(arguments[i], argument.back()).c_str());
    bool const hidden = *static_cast<std::uint64_t*>(arguments[i]) == 0 && *static_cast<std::uint64_t*>(arguments[i + 1]) == 0;
    std::printf("}, \"hidden\": %s}\n", hidden ? "true" : "false");
    return 0;
}
int cuMemsetD32Async(std::uint64_t memory, unsigned value, std::size_t count, void*) {
    std::printf("{\"cleared\": %zu, \"count\": %zu, \"value\": %u}\n", std::size_t(memory), count, value);
    return 0;
}
int cuGetErrorString(int, char const** words) { return *words = "invalid image", 0; }
}
