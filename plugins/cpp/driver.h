// The few functions of CUDA's driver that are used, looked up in libcuda.so.1 when the first kernel is: an engine can be built,
// and this library loaded, where there is no driver.
#pragma once

#include "tables.h"

namespace normrewrite::driver {

// A kernel on the GPU of this thread, loaded once a context. Throws Refused.
void* loaded(Kernel const& kernel);

// arguments: the address of each, in the kernel's order.
void launch(void* function, Kernel const& kernel, std::int64_t programs, void** arguments, void* stream);

// Zeros, `count` words of four bytes.
void clear(void* memory, std::size_t count, void* stream);

}  // namespace normrewrite::driver
