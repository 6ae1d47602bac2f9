// kernels.bin as it is, inside the library.
#include "tables.h"

__asm__(
    ".section .rodata\n"
    ".balign 64\n"
    "normrewrite_code:\n"
    ".incbin \"kernels.bin\"\n"
    ".byte 0\n"
    ".previous\n");

extern "C" __attribute__((visibility("hidden"))) unsigned char const normrewrite_code[];

namespace normrewrite {

unsigned char const* code_at(std::size_t offset) { return normrewrite_code + offset; }

}  // namespace normrewrite
