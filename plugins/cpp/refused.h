#pragma once

#include <stdexcept>

namespace normrewrite {

// What is told to whoever built or runs an engine: what was found, what was needed, what to do.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace normrewrite
