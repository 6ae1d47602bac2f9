// A norm without TensorRT: for each line OPERATOR|eps=1e-5;reads=1,0,0,0,0|2x4x1x21,4x1x1,4x1x1|float32,float32,float32|LAST
// what is launched, and then the size of the workspace, or why it is refused; by the driver of libcuda.cpp.
#include <cstdio>
#include <iostream>
#include <sstream>

#include "norm.h"
#include "refused.h"

using namespace normrewrite;

namespace {

std::vector<std::string> split(std::string const& text, char by) {
    std::vector<std::string> found;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, by);) found.push_back(part);
    return found;
}

Given given_of(std::string const& text) {
    Given given;
    for (std::string const& one : split(text, ';'))
        for (std::string const& value : split(one.substr(one.find('=') + 1), ',')) given[one.substr(0, one.find('='))].push_back(std::stod(value));
    return given;
}

Operator const& named(std::string const& name) {
    for (Operator const& op : OPERATORS)
        if (op.name == name) return op;
    throw Refused("no operator " + name);
}

void told_of(std::string const& line) {
    auto const parts = split(line, '|');
    Norm const norm(named(parts[0]), given_of(parts[1]), "norm");
    std::vector<Shape> shapes;
    for (std::string const& text : split(parts[2], ',')) {
        shapes.emplace_back();
        for (std::string const& size : split(text, 'x')) shapes.back().push_back(std::stoll(size));
    }
    auto const dtypes = split(parts[3], ',');
    norm.check(shapes, dtypes);
    Shape const& x = shapes[0];
    Tensor const tensor{x[0], x[1], x[2], x[3], parts[4] == "1", dtypes[0]};
    auto const steps = norm.plan(tensor);
    load(steps);
    auto const at = [](std::uint64_t place) { return reinterpret_cast<void*>(place << 40); };
    run(steps, {at(1), at(2), at(3), at(4), at(5)}, reinterpret_cast<void*>(7));
    std::printf("{\"workspace\": %zu}\n", norm.workspace(tensor));
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        try {
            told_of(line);
        } catch (Refused const& error) {
            std::printf("{\"refused\": \"%s\"}\n", error.what());
        }
        std::printf("{\"done\": true}\n");
    }
}
