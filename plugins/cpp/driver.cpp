#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

#include "refused.h"

namespace normrewrite::driver {
namespace {

// As cuda.h of CUDA 11 to 13 declares them.
constexpr int MAJOR = 75, MINOR = 76;      // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int MAX_DYNAMIC_SHARED_SIZE = 8;  // CU_FUNC_ATTRIBUTE_*
constexpr unsigned MOST_SHARED_BY_ITSELF = 48 * 1024;

struct Driver {
    int (*context)(void**);
    int (*device)(int*);
    int (*attribute)(int*, int, int);
    int (*load)(void**, void const*);
    int (*function)(void**, void*, char const*);
    int (*set)(void*, int, int);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    int (*clear)(std::uint64_t, unsigned, std::size_t, void*);
    int (*words)(int, char const**);
};

template <class Function>
void find(void* library, Function& function, char const* name) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) throw Refused(std::string("libcuda.so.1 has no ") + name + ". Install a driver of CUDA 11 or newer.");
}

Driver opened() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) throw Refused("libcuda.so.1, NVIDIA's driver, can't be opened here; an engine runs only where it is.");
    Driver driver{};
    find(library, driver.context, "cuCtxGetCurrent");
    find(library, driver.device, "cuCtxGetDevice");
    find(library, driver.attribute, "cuDeviceGetAttribute");
    find(library, driver.load, "cuModuleLoadData");
    find(library, driver.function, "cuModuleGetFunction");
    find(library, driver.set, "cuFuncSetAttribute");
    find(library, driver.launch, "cuLaunchKernel");
    find(library, driver.clear, "cuMemsetD32Async");
    find(library, driver.words, "cuGetErrorString");
    return driver;
}

Driver const& driver() {
    static Driver const found = opened();
    return found;
}

void check(int result, std::string const& what) {
    if (!result) return;
    char const* words = nullptr;
    driver().words(result, &words);
    throw Refused(what + ": CUDA's driver says " + (words ? words : std::to_string(result)) + ".");
}

int capability() {
    int device = 0, major = 0, minor = 0;
    check(driver().device(&device), "which GPU");
    check(driver().attribute(&major, MAJOR, device), "its compute capability");
    check(driver().attribute(&minor, MINOR, device), "its compute capability");
    return 10 * major + minor;
}

// Machine code for this very GPU, else the newest PTX that is not newer than it.
Code const& fitting(Kernel const& kernel, int here) {
    Code const* best = nullptr;
    for (Code const& code : kernel.codes) {
        if (code.ptx ? code.capability > here : code.capability != here) continue;
        if (!best || best->ptx) best = &code;
    }
    if (best) return *best;
    throw Refused("this library has no kernels for compute capability " + std::to_string(here / 10) + "." +
                  std::to_string(here % 10) + ": build it with -DNORMREWRITE_CAPABILITIES=80 (8.0 and newer) or for this one.");
}

void* load(Kernel const& kernel) {
    void *module = nullptr, *function = nullptr;
    check(driver().load(&module, code_at(fitting(kernel, capability()).offset)), "kernel " + kernel.key);
    check(driver().function(&function, module, kernel.entry.c_str()), "kernel " + kernel.key);
    if (kernel.shared > MOST_SHARED_BY_ITSELF)
        check(driver().set(function, MAX_DYNAMIC_SHARED_SIZE, static_cast<int>(kernel.shared)), "kernel " + kernel.key);
    return function;
}

}  // namespace

void* loaded(Kernel const& kernel) {
    static std::mutex mutex;
    static std::map<std::pair<void*, Kernel const*>, void*> known;
    void* context = nullptr;
    check(driver().context(&context), "the context of this thread");
    std::lock_guard<std::mutex> const lock(mutex);
    auto const place = known.find({context, &kernel});
    if (place != known.end()) return place->second;
    return known[{context, &kernel}] = load(kernel);
}

void launch(void* function, Kernel const& kernel, std::int64_t programs, void** arguments, void* stream) {
    auto const grid = static_cast<unsigned>(programs);
    check(driver().launch(function, grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, arguments, nullptr), kernel.key);
}

void clear(void* memory, std::size_t count, void* stream) {
    check(driver().clear(reinterpret_cast<std::uint64_t>(memory), 0, count, stream), "clearing memory");
}

}  // namespace normrewrite::driver
