// The layout of a planned program, as src/graph/plan.ts writes it. Shared by the CPU's and the GPU's runners.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

// Offsets in the workspace are in units of this many bytes.
constexpr int64_t ARENA_UNIT = 64;

// Words of a value's record; four pairs (size or factor, symbol or -1) start at DIMS. OUT is the value's index among the
// program's outputs, or -1.
enum { PLACE, INDEX, OFFSET, OUT, DTYPE, RANK, DIMS, VALUE_WORDS = DIMS + 8 };

// Where a value is stored. Names and codes are compared with those of src/graph/plan.ts when the addon loads.
//   ARENA   in the workspace, at INDEX units; in the caller's memory if it is a requested output
//   WEIGHT, STATE, INPUT, OUTPUT   in the INDEX-th entry of its list
//   VIEW    in the memory of value INDEX, from byte OFFSET on
//   UNUSED  nowhere: no call refers to it
#define PLACES(_) _(ARENA, 0, "arena") _(WEIGHT, 1, "weight") _(STATE, 2, "state") _(INPUT, 3, "input") _(OUTPUT, 4, "output") _(VIEW, 5, "view") _(UNUSED, 6, "unused")
#define ENUMERATOR(id, code, name) id = code,
enum Place : int32_t { PLACES(ENUMERATOR) };
#undef ENUMERATOR

struct Plan {
  std::vector<std::string> ops;
  std::vector<std::string> weights;  // names
  std::vector<int32_t> values;       // VALUE_WORDS per value
  std::vector<int32_t> calls;        // op, inputs n, outputs m, first parameter, n + m value ids
  std::vector<double> params;
  std::vector<int64_t> capacity;  // of each symbol
  size_t arena_bytes = 0;
};

// Memory lent by the caller for a run. `data` is null if none was lent, and not null even if it is empty.
struct Span {
  void* data;
  size_t bytes;
};
