// IPluginV3 for TensorRT 10 and 11 and TensorRT-RTX: what TensorRT asks is handed to a Norm. No symbol of TensorRT is needed.
#include <NvInferRuntime.h>

#include <cstdio>
#include <memory>

#include "norm.h"
#include "refused.h"

namespace normrewrite {
namespace {

using namespace nvinfer1;

// On stderr: TensorRT's own logger is found by an interface that 10 and 11 lay out differently.
void say(std::string const& message) noexcept { std::fprintf(stderr, "normrewrite: %s\n", message.c_str()); }

// TensorRT takes numbers for answers, and no exceptions: 0 where all is well.
template <class Function>
std::int32_t told(Function const& function) noexcept {
    try {
        function();
        return 0;
    } catch (std::exception const& error) {
        say(error.what());
        return 1;
    }
}

std::string named(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "float32";
        case DataType::kHALF: return "float16";
        case DataType::kINT8: return "int8";
        case DataType::kBF16: return "bfloat16";
        default: return "a type of number " + std::to_string(static_cast<int>(type));
    }
}

Shape shape_of(Dims const& dims) { return Shape(dims.d, dims.d + dims.nbDims); }

bool is_last(TensorFormat format) { return format == TensorFormat::kHWC || format == TensorFormat::kHWC8; }

Tensor tensor_of(Dims const& dims, PluginTensorDesc const& x) {
    return {dims.d[0], dims.d[1], dims.d[2], dims.d[3], is_last(x.format) && dims.d[3] > 1, named(x.type)};
}

bool embedded(std::string const& dtype) {
    for (Kernel const& kernel : KERNELS)
        if (kernel.key.find(" " + dtype + " ") != std::string::npos) return true;
    return false;
}

// TensorRT's channels-last is that of the kernels where groups are channels; HWC8 pads channels, and the kernels do not.
bool fits_last(PluginTensorDesc const& x) {
    bool const one_each = x.dims.nbDims == 4 && x.dims.d[2] == 1 && x.dims.d[1] > 1;
    if (x.type == DataType::kHALF) return one_each && x.format == TensorFormat::kHWC8 && x.dims.d[1] % 8 == 0;
    return one_each && x.type == DataType::kFLOAT && x.format == TensorFormat::kHWC;
}

// Attributes as TensorRT holds them, 32 bits a number.
struct Fields {
    std::vector<std::vector<std::int32_t>> whole;
    std::vector<std::vector<float>> real;
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};

    Fields(Operator const& op, Given const* given) {
        whole.reserve(op.attributes.size()), real.reserve(op.attributes.size());
        for (Attribute const& attribute : op.attributes) {
            std::vector<double> const& values = given ? given->at(attribute.name) : attribute.defaults;
            auto const length = static_cast<std::int32_t>(values.size());
            whole.emplace_back(values.begin(), values.end()), real.emplace_back(values.begin(), values.end());
            void const* const data = attribute.whole ? static_cast<void const*>(whole.back().data()) : real.back().data();
            auto const type = attribute.whole ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
            fields.emplace_back(attribute.name.c_str(), data, type, length);
        }
        collection = {static_cast<std::int32_t>(fields.size()), fields.data()};
    }
};

std::vector<double> numbers(PluginField const& field) {
    std::vector<double> found;
    for (std::int32_t i = 0; i < field.length; ++i) switch (field.type) {
            case PluginFieldType::kINT32: found.push_back(static_cast<std::int32_t const*>(field.data)[i]); break;
            case PluginFieldType::kINT64: found.push_back(double(static_cast<std::int64_t const*>(field.data)[i])); break;
            case PluginFieldType::kFLOAT32: found.push_back(static_cast<float const*>(field.data)[i]); break;
            case PluginFieldType::kFLOAT64: found.push_back(static_cast<double const*>(field.data)[i]); break;
            default: throw Refused(std::string("attribute ") + field.name + " is no number.");
        }
    return found;
}

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(Norm norm) : norm_(std::move(norm)) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        auto* const copied = new Plugin(norm_);
        copied->steps_ = steps_;
        return copied;
    }
    AsciiChar const* getPluginName() const noexcept override { return norm_.op().name.c_str(); }
    AsciiChar const* getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return NAMESPACE; }
    std::int32_t getNbOutputs() const noexcept override { return 1; }

    // --- while an engine is built ---

    std::int32_t getOutputDataTypes(DataType* outputs, std::int32_t, DataType const* inputs, std::int32_t count) const noexcept override {
        return told([&] {
            std::vector<std::string> dtypes;
            for (std::int32_t i = 0; i < count; ++i) dtypes.push_back(named(inputs[i]));
            norm_.check(dtypes);
            outputs[0] = inputs[0];
        });
    }

    std::int32_t getOutputShapes(DimsExprs const* inputs, std::int32_t, DimsExprs const*, std::int32_t, DimsExprs* outputs, std::int32_t,
                                 IExprBuilder&) noexcept override {
        outputs[0] = inputs[0];
        return 0;
    }

    bool supportsFormatCombination(std::int32_t place, DynamicPluginTensorDesc const* tensors, std::int32_t inputs, std::int32_t) noexcept override {
        PluginTensorDesc const &x = tensors[0].desc, &tensor = tensors[place].desc;
        bool const parameter = place > 0 && place < inputs;
        DataType const wanted = parameter && norm_.op().int8 ? DataType::kFLOAT : x.type;
        if (tensor.type != wanted || !embedded(named(x.type))) return false;
        if (place) return tensor.format == (parameter ? TensorFormat::kLINEAR : x.format);
        return x.format == TensorFormat::kLINEAR || fits_last(x);
    }

    std::int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, std::int32_t count, DynamicPluginTensorDesc const*,
                                 std::int32_t) noexcept override {
        return told([&] {
            std::vector<PluginTensorDesc> tensors;
            for (std::int32_t i = 0; i < count; ++i) tensors.push_back(inputs[i].desc);
            check(tensors.data(), count);
            if (inputs[0].max.d[0] > 0) norm_.plan(tensor_of(inputs[0].max, inputs[0].desc));
        });
    }

    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, std::int32_t, DynamicPluginTensorDesc const*, std::int32_t) const noexcept override {
        return norm_.workspace(tensor_of(inputs[0].max, inputs[0].desc));
    }

    // --- while it runs ---

    std::int32_t onShapeChange(PluginTensorDesc const* inputs, std::int32_t count, PluginTensorDesc const*, std::int32_t) noexcept override {
        return told([&] {
            check(inputs, count);
            steps_ = norm_.plan(tensor_of(inputs[0].dims, inputs[0]));
            load(steps_);
        });
    }

    std::int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) noexcept override {
        return told([&] {
            auto const at = [inputs](int i) { return const_cast<void*>(inputs[i]); };
            run(steps_, {at(0), at(1), at(2), outputs[0], workspace}, stream);
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields_ = std::make_unique<Fields>(norm_.op(), &norm_.given());
        return &fields_->collection;
    }

private:
    void check(PluginTensorDesc const* inputs, std::int32_t count) const {
        std::vector<Shape> shapes;
        std::vector<std::string> dtypes;
        for (std::int32_t i = 0; i < count; ++i) shapes.push_back(shape_of(inputs[i].dims)), dtypes.push_back(named(inputs[i].type));
        norm_.check(shapes, dtypes);
    }

    Norm norm_;
    std::vector<Step> steps_;
    std::unique_ptr<Fields> fields_;
};

class Creator : public IPluginCreatorV3One {
public:
    explicit Creator(Operator const& op) : op_(op), fields_(op, nullptr) {}

    IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        Plugin* made = nullptr;
        told([&] {
            Given given;
            for (std::int32_t i = 0; i < fields->nbFields; ++i)
                if (known(fields->fields[i].name)) given[fields->fields[i].name] = numbers(fields->fields[i]);
            made = new Plugin(Norm(op_, given, name ? name : ""));
        });
        return made;
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_.collection; }
    AsciiChar const* getPluginName() const noexcept override { return op_.name.c_str(); }
    AsciiChar const* getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return NAMESPACE; }

private:
    bool known(std::string const& name) const {
        for (Attribute const& attribute : op_.attributes)
            if (attribute.name == name) return true;
        return false;
    }

    Operator const& op_;
    Fields fields_;
};

}  // namespace
}  // namespace normrewrite

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static std::vector<std::unique_ptr<normrewrite::Creator>> const creators = [] {
        std::vector<std::unique_ptr<normrewrite::Creator>> made;
        for (normrewrite::Operator const& op : normrewrite::OPERATORS) made.push_back(std::make_unique<normrewrite::Creator>(op));
        return made;
    }();
    static std::vector<nvinfer1::IPluginCreatorInterface*> const list = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> all;
        for (auto const& each : creators) all.push_back(each.get());
        return all;
    }();
    count = static_cast<std::int32_t>(list.size());
    return list.data();
}

// TensorRT looks for it; see say.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
