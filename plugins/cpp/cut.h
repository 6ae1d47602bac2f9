// How a tensor is cut: normrewrite/backends/triton/geometry.py's of_samples and fixed.py, number by number.
#pragma once

#include <algorithm>

#include "tables.h"

namespace normrewrite {

using Int = std::int64_t;

inline Int quotient(Int a, Int b) { return (a + b - 1) / b; }

inline Int fitting(std::vector<Int> const& sizes, Int n) {
    for (Int size : sizes)
        if (size >= n) return size;
    return sizes.back();
}

inline Int access(Int width, Int bytes) { return width % (16 / bytes) ? 1 : 16 / bytes; }

// x: (B, G, K, S). Channels-last only where K is 1 and S is not, and dense.
struct Tensor {
    Int samples, groups, each, positions;
    bool last;
    std::string dtype;

    Int bytes() const { return dtype == "float32" ? 4 : dtype == "float16" ? 2 : 1; }
    Int n() const { return each * positions; }
    Int lanes() const { return samples * groups * each; }
    Int channels() const { return groups * each; }
    Int width() const { return last ? channels() : positions; }  // elements side by side in memory
};

struct Cut {
    Int lanes, steps, blocks, parts, iterations, vector;
    Int programs() const { return blocks * parts; }
};

// iterations: tiles a program takes, 0 for as many as a part has. k > 0: parts that are searched for k extremes.
inline Cut cut(Tensor const& x, Int iterations, Int k) {
    auto const room = std::find(SIZES.extremes.begin(), SIZES.extremes.end(), fitting(SIZES.extremes, k));
    Int const part = k ? SIZES.searched_parts[room - SIZES.extremes.begin()] : SIZES.part;
    Int const lanes = x.last ? fitting(SIZES.sides, x.width()) : 0;
    Int const steps = std::min(x.last ? SIZES.tile / lanes : fitting(SIZES.runs, x.width()), part);
    Cut found{x.last ? lanes : SIZES.tile / steps, steps, 0, 0, 0, access(x.width(), x.bytes())};
    found.blocks = x.last ? quotient(x.channels(), lanes) * x.samples : quotient(x.lanes(), found.lanes);
    Int const tiles = quotient(x.positions, steps), whole = part / steps;
    found.iterations = k ? whole : std::min(iterations ? iterations : whole, std::max<Int>(1, tiles));
    found.parts = quotient(tiles, found.iterations);
    return found;
}

}  // namespace normrewrite
