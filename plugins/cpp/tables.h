// What normrewrite.plugins.embedded writes: operators and sizes as Python defines them, and the compiled kernels.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace normrewrite {

// Of a node. One number, or as many as there are defaults.
struct Attribute {
    std::string name;
    bool whole;
    double least, most;
    bool above;  // whether the least is itself too little
    std::string words;
    std::vector<double> defaults;
};

struct Operator {
    std::string name, family;  // "mean", "top", "span"
    bool int8;                 // x and y are, weight and bias float32; else all are alike
    std::vector<Attribute> attributes;
};

// Machine code for one compute capability, or PTX for it and all later ones, ended by a zero.
struct Code {
    int capability;
    bool ptx;
    std::size_t offset;
};

struct Kernel {
    std::string key;        // "apply float16 SAMPLE=1 RELU=0 ...": what it is found by
    std::string entry;      // its name in the code
    std::string arguments;  // "x_ptr:p lanes:i eps:f": in its order; p(ointer), i(nt32), l(ong), f(loat32)
    unsigned threads, shared;
    std::vector<Code> codes;
};

// normrewrite/backends/triton/fixed.py's, in its order.
struct Sizes {
    std::vector<std::int64_t> sides, runs, widths, extremes, searched_parts;
    std::int64_t part, members, tile, repeat, row_width, sparse_width, largest_k;
};

extern char const* const NAMESPACE;
extern char const* const VERSION;
extern std::vector<Operator> const OPERATORS;
extern std::map<std::string, std::vector<std::string>> const CONSTANTS;  // of a kernel, in the order of its keys
extern Sizes const SIZES;
extern std::vector<Kernel> const KERNELS;

unsigned char const* code_at(std::size_t offset);

}  // namespace normrewrite
