#include "norm.h"

#include <cstring>
#include <limits>
#include <sstream>
#include <unordered_map>

#include "driver.h"
#include "refused.h"

namespace normrewrite {
namespace {

char const* const INPUTS[] = {"x", "weight", "bias"};
std::size_t const RANKS[] = {4, 3, 3};

std::string words(Shape const& shape) {
    std::string text;
    for (Int size : shape) text += (text.empty() ? "" : "×") + std::to_string(size);
    return text;
}

std::string listed(std::vector<double> const& values) {
    std::ostringstream text;
    for (std::size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
    return text.str();
}

std::string joined(std::vector<std::string> const& texts) {
    std::string all;
    for (std::string const& text : texts) all += (all.empty() ? "" : ", ") + text;
    return all;
}

bool holds(Attribute const& attribute, std::vector<double> const& values) {
    if (values.size() != attribute.defaults.size()) return false;
    for (double value : values) {
        bool const fits = value >= attribute.least && value <= attribute.most && !(attribute.above && value == attribute.least);
        if (!fits || !std::isfinite(value) || (attribute.whole && value != std::floor(value))) return false;
    }
    return true;
}

std::string word(Value const& value) {
    return std::holds_alternative<std::string>(value) ? std::get<std::string>(value) : std::to_string(std::get<Int>(value));
}

Kernel const* find(std::string const& name, std::string const& dtype, Values const& told) {
    static std::unordered_map<std::string, Kernel const*> const known = [] {
        std::unordered_map<std::string, Kernel const*> all;
        for (Kernel const& kernel : KERNELS) all[kernel.key] = &kernel;
        return all;
    }();
    std::string key = name + " " + (name == "settle" ? "-" : dtype);
    for (std::string const& constant : CONSTANTS.at(name)) key += " " + constant + "=" + word(told.at(constant));
    auto const found = known.find(key);
    if (found != known.end()) return found->second;
    throw Refused("this library was built without the kernel \"" + key + "\"; build it for all operators and dtypes.");
}

Int whole(std::string const& name, Value const& value) {
    Int const number = std::get<Int>(value);
    if (number > std::numeric_limits<std::int32_t>::max())
        throw Refused(name + " is " + std::to_string(number) + ", and kernels count to 2147483647. Make the tensor smaller.");
    return number;
}

// A kernel with those of the values that it names.
Step step(std::string const& name, std::string const& dtype, Int programs, Values const& told) {
    Step made{find(name, dtype, told), programs, {}};
    whole("the number of programs of " + name, programs);
    std::istringstream names(made.kernel->arguments);
    for (std::string argument; names >> argument;) {
        std::string const of = argument.substr(0, argument.size() - 2);
        made.arguments.push_back(argument.back() == 'i' ? Value(whole(of, told.at(of))) : told.at(of));
    }
    return made;
}

Values cut_values(Tensor const& x, Cut const& pieces) {
    return {
        {"lanes", x.lanes()},         {"length", x.positions},      {"channels", x.channels()},
        {"members", x.each},          {"lane_of_group", x.each},    {"lane_of_member", Int(1)},
        {"COLUMNS", Int(x.last)},     {"SAMPLE", Int(1)},           {"LANES", pieces.lanes},
        {"STEPS", pieces.steps},      {"VEC", pieces.vector},       {"blocks", pieces.blocks},
        {"parts", pieces.parts},      {"iterations", pieces.iterations}, {"MEMBERS", SIZES.members},
    };
}

Values operator|(Values told, Values const& more) {
    for (auto const& [name, value] : more) told[name] = value;
    return told;
}

Place in(Base base, std::size_t offset = 0) { return {base, offset}; }

}  // namespace

// --- what it takes ---------------------------------------------------------------------------------------------------

Norm::Norm(Operator const& op, Given const& given, std::string node) : op_(&op), node_(std::move(node)) {
    for (Attribute const& attribute : op.attributes) {
        auto const found = given.find(attribute.name);
        std::vector<double> const& values = found == given.end() ? attribute.defaults : found->second;
        if (!holds(attribute, values))
            refuse(": attribute " + attribute.name + " is " + listed(values) + ", out of range: it is " + attribute.words);
        given_[attribute.name] = values;
    }
    if (at("count") && at("percent")) refuse(": count and percent exclude each other");
    if (family() == "mean") refuse(": power " + listed({at("power")}) + ": the kernels know powers 1 and 2. Build with --plugins off");
}

void Norm::refuse(std::string const& problem) const {
    throw Refused("node " + (node_.empty() ? op_->name : node_) + problem + ".");
}

double Norm::at(char const* name, double missing) const {
    auto const found = given_.find(name);
    return found == given_.end() ? missing : found->second[0];
}

// What kernels call it: l1, l2, top or span; mean where they have none.
std::string Norm::family() const {
    if (op_->family != "mean") return op_->family;
    double const power = at("power", 1);
    return power == 1 ? "l1" : power == 2 ? "l2" : "mean";
}

Int Norm::k(Int n) const {
    if (op_->family == "span") return 1;
    if (op_->family != "top") return 0;
    Int const asked = at("percent") ? std::llrint(at("percent") * double(n) / 100) : Int(at("count"));
    return std::max<Int>(1, asked);
}

// C(n): one over the node's polynomial.
double Norm::gain(Int n) const {
    double const t = op_->family == "mean" ? std::sqrt(1 - 1.0 / double(n)) : std::sqrt(std::log(double(n)));
    double read = 0, power = 1;
    for (double coefficient : given_.at("reads")) read += coefficient * power, power *= t;
    if (read <= 0) refuse(": attribute reads gives " + listed({read}) + " for " + std::to_string(n) + " elements, and must be above 0");
    return 1 / read;
}

void Norm::check(std::vector<std::string> const& dtypes) const {
    if (dtypes.size() != 3) refuse(" takes x, weight, bias, got " + std::to_string(dtypes.size()) + " inputs");
    if (op_->int8) {
        if (dtypes != std::vector<std::string>{"int8", "float32", "float32"}) refuse(" takes int8, float32, float32, got " + joined(dtypes));
        return;
    }
    bool const alike = dtypes[0] == dtypes[1] && dtypes[0] == dtypes[2];
    if (!alike || (dtypes[0] != "float32" && dtypes[0] != "float16"))
        refuse(" takes float32 or float16 for all inputs alike, got " + joined(dtypes));
}

void Norm::check(std::vector<Shape> const& shapes, std::vector<std::string> const& dtypes) const {
    check(dtypes);
    if (auto const problem = misfit(shapes)) refuse(*problem);
    Shape const& x = shapes[0];
    if (x[2] != -1 && x[3] != -1) check_size({1, 1, x[2], x[3], false, dtypes[0]});
}

std::optional<std::string> Norm::misfit(std::vector<Shape> const& shapes) const {
    for (std::size_t i = 0; i < 3; ++i)
        if (shapes[i].size() != RANKS[i])
            return std::string(" takes ") + INPUTS[i] + " of rank " + std::to_string(RANKS[i]) + ", got " + words(shapes[i]);
    Shape const wanted{shapes[0][1], shapes[0][2], 1};
    for (std::size_t i = 1; i < 3; ++i)
        for (std::size_t axis = 0; axis < 3; ++axis) {
            Int const a = shapes[i][axis], b = wanted[axis];
            if (a != b && a != -1 && b != -1)
                return std::string(" takes ") + INPUTS[i] + " " + words(wanted) + ", got " + words(shapes[i]);
        }
    return {};
}

// Sizes that no kernel serves; Python's plugins leave those to torch.
void Norm::check_size(Tensor const& x) const {
    Int const n = x.n(), found = k(n), least = std::max<Int>(2, op_->family == "top" && !at("percent") ? found : 2);
    if (n < least) refuse(" needs " + std::to_string(least) + " elements that share statistics, got " + std::to_string(n));
    if (found > SIZES.largest_k)
        refuse(" asks for " + std::to_string(found) + " extremes, the kernels find up to " + std::to_string(SIZES.largest_k));
    Int const longest = found ? SIZES.sparse_width : SIZES.row_width;
    if (x.positions == 1 && n > longest)
        refuse(" has rows of " + std::to_string(n) + " elements, the kernels keep up to " + std::to_string(longest));
}

// --- what it launches ------------------------------------------------------------------------------------------------

// Where in the workspace; "end" is its size.
std::map<std::string, std::size_t> Norm::places(Tensor const& x) const {
    std::map<std::string, std::size_t> found;
    std::size_t end = 0;
    auto const take = [&](char const* name, Int bytes) {
        found[name] = end;
        end += std::size_t(quotient(bytes, 256) * 256);
    };
    Int const groups = x.samples * x.groups, taken = groups * (op_->family == "span" ? 2 : k(x.n()));
    take("mean", 4 * groups);
    take("spread", 4 * groups);
    take("partial", 4 * 3 * cut(x, 0, k(x.n())).parts * x.lanes());
    take("indices", 8 * taken);
    take("signs", 4 * taken);
    found["end"] = end;
    return found;
}

std::size_t Norm::workspace(Tensor const& x) const { return places(x).at("end"); }

Values Norm::constants(Tensor const& x) const {
    Int const n = x.n();
    return {
        {"x_ptr", in(Base::X)},    {"weight_ptr", in(Base::WEIGHT)}, {"bias_ptr", in(Base::BIAS)}, {"y_ptr", in(Base::Y)},
        {"gain", gain(n)},         {"eps", at("eps")},               {"n", double(n)},             {"FAMILY", family()},
        {"CENTRED", Int(centred())},
    };
}

std::vector<Step> Norm::plan(Tensor const& x) const {
    check_size(x);
    if (!x.samples) return {};
    if (x.positions == 1) return rows(x);
    std::vector<Step> steps;
    Values told = constants(x);
    auto const where = places(x);
    for (char const* name : {"mean", "spread", "partial", "indices", "signs"})
        told[std::string(name) + "_ptr"] = in(Base::WORKSPACE, where.at(name));
    (this->*(k(x.n()) ? &Norm::sparse : &Norm::dense))(x, told, steps);
    Cut const pieces = cut(x, SIZES.repeat, 0);
    told = told | cut_values(x, pieces) | Values{{"scale_ptr", told.at("spread_ptr")}, {"RELU", Int(0)}};
    steps.push_back(step("apply", x.dtype, pieces.programs(), told));
    return steps;
}

// Layer and RMS norms: one read of each tensor.
std::vector<Step> Norm::rows(Tensor const& x) const {
    Int const width = fitting(SIZES.widths, x.n()), each = std::max<Int>(1, SIZES.tile / 4 / width);
    Values const told = constants(x) | Values{
        {"samples", x.samples}, {"groups", x.groups}, {"n", x.n()}, {"k", op_->family == "span" ? 2 : std::max<Int>(1, k(x.n()))},
        {"ROWS", each}, {"WIDTH", width}, {"VEC", access(x.n(), x.bytes())}, {"POSITIONS", Int(1)},
    };
    return {step("row_forward", x.dtype, quotient(x.samples, each) * x.groups, told)};
}

void Norm::dense(Tensor const& x, Values told, std::vector<Step>& steps) const {
    Cut const pieces = cut(x, 0, 0);
    bool const squares = family() == "l2";
    Int const groups = x.samples * x.groups;
    told = told | cut_values(x, pieces) | Values{{"SQUARES", Int(squares)}, {"EXTREMES", Int(0)}, {"SIGNS", Int(0)}};
    if (squares || centred()) {
        steps.push_back(step("moments", x.dtype, pieces.programs(), told));
        told["STAGE"] = std::string(squares ? "mean and squares" : "mean");
        steps.push_back(step("settle", x.dtype, groups, told));
    } else {
        steps.push_back({nullptr, groups, {told.at("mean_ptr")}});
    }
    if (squares) return;
    steps.push_back(step("deviations", x.dtype, pieces.programs(), told));
    told["STAGE"] = std::string("deviations");
    steps.push_back(step("settle", x.dtype, groups, told));
}

void Norm::sparse(Tensor const& x, Values told, std::vector<Step>& steps) const {
    Int const found = k(x.n());
    Cut const pieces = cut(x, 0, found);
    told = told | cut_values(x, pieces) | Values{
        {"SQUARES", Int(0)}, {"EXTREMES", Int(1)}, {"k", found}, {"K", fitting(SIZES.extremes, found)},
        {"SPAN", Int(op_->family == "span")}, {"PART", pieces.steps * pieces.iterations},
    };
    steps.push_back(step("moments", x.dtype, pieces.programs(), told));
    steps.push_back(step("select", x.dtype, x.samples * x.groups, told));
}

// --- launched --------------------------------------------------------------------------------------------------------

namespace {

// Eight bytes that hold an argument as its kernel wants it.
std::uint64_t packed(Value const& value, char kind, std::array<void*, 5> const& memory) {
    std::uint64_t bytes = 0;
    auto const hold = [&bytes](auto number) { std::memcpy(&bytes, &number, sizeof number); };
    if (auto const* place = std::get_if<Place>(&value)) {
        hold(reinterpret_cast<std::uint64_t>(memory[std::size_t(place->base)]) + place->offset);
        if (bytes % 16) throw Refused("memory that TensorRT gave does not begin at a multiple of 16 bytes.");
    } else if (kind == 'f') {
        hold(static_cast<float>(std::get<double>(value)));
    } else if (kind == 'l') {
        hold(std::get<Int>(value));
    } else {
        hold(static_cast<std::int32_t>(std::get<Int>(value)));
    }
    return bytes;
}

// The kinds of a kernel's arguments: "ppif".
std::string kinds(Kernel const& kernel) {
    std::string found;
    std::istringstream names(kernel.arguments);
    for (std::string argument; names >> argument;) found += argument.back();
    return found;
}

}  // namespace

void load(std::vector<Step> const& steps) {
    for (Step const& step : steps)
        if (step.kernel) driver::loaded(*step.kernel);
}

void run(std::vector<Step> const& steps, std::array<void*, 5> const& memory, void* stream) {
    for (Step const& step : steps) {
        if (!step.kernel) {
            auto const cleared = packed(step.arguments[0], 'p', memory);
            driver::clear(reinterpret_cast<void*>(cleared), std::size_t(step.programs), stream);
            continue;
        }
        std::string const kind = kinds(*step.kernel);
        std::vector<std::uint64_t> held(kind.size() + 2, 0);  // behind its arguments two of Triton's own, to memory it never asks for
        for (std::size_t i = 0; i < kind.size(); ++i) held[i] = packed(step.arguments[i], kind[i], memory);
        std::vector<void*> addresses;
        for (std::uint64_t& each : held) addresses.push_back(&each);
        driver::launch(driver::loaded(*step.kernel), *step.kernel, step.programs, addresses.data(), stream);
    }
}

}  // namespace normrewrite
