// One norm: an operator with its attributes, what it refuses, and what it launches for a tensor. Nothing here needs TensorRT.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "cut.h"

namespace normrewrite {

using Given = std::map<std::string, std::vector<double>>;
using Shape = std::vector<Int>;  // -1: open

// Memory that is known only when a kernel runs.
enum class Base { X, WEIGHT, BIAS, Y, WORKSPACE };
struct Place {
    Base base;
    std::size_t offset;
};
using Value = std::variant<Int, double, std::string, Place>;
using Values = std::map<std::string, Value>;

// One launch, or, without a kernel, `programs` words to be cleared at the first place.
struct Step {
    Kernel const* kernel;
    Int programs;
    std::vector<Value> arguments;
};

class Norm {
public:
    // Attributes that are missing have their defaults. Throws Refused for one that is out of range.
    Norm(Operator const& op, Given const& given, std::string node);

    Operator const& op() const { return *op_; }
    Given const& given() const { return given_; }
    std::string const& node() const { return node_; }

    // Throws Refused where inputs x, weight, bias can't be taken; sizes may be open.
    void check(std::vector<Shape> const& shapes, std::vector<std::string> const& dtypes) const;
    void check(std::vector<std::string> const& dtypes) const;

    std::vector<Step> plan(Tensor const& x) const;
    // Bytes that serve x and every smaller tensor.
    std::size_t workspace(Tensor const& x) const;

private:
    double at(char const* name, double missing = 0) const;
    Int k(Int n) const;
    double gain(Int n) const;
    std::string family() const;
    bool centred() const { return at("centred", 1) != 0; }
    std::optional<std::string> misfit(std::vector<Shape> const& shapes) const;
    void check_size(Tensor const& x) const;
    std::map<std::string, std::size_t> places(Tensor const& x) const;

    Values constants(Tensor const& x) const;
    std::vector<Step> rows(Tensor const& x) const;
    void dense(Tensor const& x, Values told, std::vector<Step>& steps) const;
    void sparse(Tensor const& x, Values told, std::vector<Step>& steps) const;
    [[noreturn]] void refuse(std::string const& problem) const;

    Operator const* op_;
    Given given_;
    std::string node_;
};

// memory: x, weight, bias, y, workspace.
void run(std::vector<Step> const& steps, std::array<void*, 5> const& memory, void* stream);
// Kernels loaded beforehand, as a graph that is being captured can't.
void load(std::vector<Step> const& steps);

}  // namespace normrewrite
