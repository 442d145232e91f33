// All kernels of one instruction set; included once by each isa/*.cpp.
#include "vector.h"

#include "matrix.inl"
#include "experts.inl"
#include "attention.inl"
#include "elementwise.inl"
#include "layout.inl"
#include "sampling.inl"
#include "limits.inl"

namespace ISA {

static const KernelEntry ENTRIES[] = {
    {"embed", embed},
    {"rmsNorm", rms_norm},
    {"addRmsNorm", add_rms_norm},
    {"toBf16Pair", to_bf16_pairs},
    {"toInt8", to_int8_rows},
    {"linear", linear},
    {"groupedLinear", grouped_linear},
    {"gatedLinear", gated_linear},
    {"groupedGatedLinear", grouped_gated_linear},
    {"add", add},
    {"scale", scale},
    {"siluMul", silu_mul},
    {"angles", angles},
    {"rope", rope},
    {"pagedWrite", paged_write},
    {"pagedAttention", paged_attention},
    {"route", route},
    {"group", group},
    {"combine", combine},
    {"gather", gather},
    {"replaceRows", replace_rows},
    {"reshape", reshape},
    {"slice", slice},
    {"transpose", transpose},
    {"processLogits", process_logits},
    {"sample", sample},
    {"topLogprobs", top_logprobs},
    {nullptr, nullptr},
};

extern const KernelTable TABLE;
const KernelTable TABLE = {ISA_NAME, ENTRIES, LIMITS};

}  // namespace ISA
