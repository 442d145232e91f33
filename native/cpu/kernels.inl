// All kernels of one instruction set; included once by each isa/*.cpp.
#include "vector.h"

#include "matrix.inl"
#ifdef HAS_AMX
#include "tiles_int8.inl"
#endif
#include "experts.inl"
#include "attention.inl"
#include "elementwise.inl"
#include "layout.inl"
#include "sampling.inl"
#include "gemm.inl"
#ifdef HAS_AMX
#include "tiles.inl"
#endif
#include "matrix_backward.inl"
#include "experts_backward.inl"
#include "attention_whole.inl"
#include "elementwise_backward.inl"
#include "loss.inl"
#include "tuning.inl"
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
    {"addRows", add_rows},
    {"adaptedSlots", adapted_slots},
    {"reshape", reshape},
    {"slice", slice},
    {"transpose", transpose},
    {"processLogits", process_logits},
    {"sample", sample},
    {"topLogprobs", top_logprobs},
    {"tiledLinear", tiled_linear},
    {"tiledGroupedLinear", tiled_grouped_linear},
    {"addLinear", add_linear},
    {"addGroupedLinear", add_grouped_linear},
    {"addLinearT", linear_t},
    {"linearT", linear_t},
    {"outer", outer},
    {"sumRows", sum_rows},
    {"groupedLinearT", grouped_linear_t},
    {"groupedOuter", grouped_outer},
    {"groupedSumRows", grouped_sum_rows},
    {"routeGrad", route_grad},
    {"spread", spread},
    {"slotDots", slot_dots},
    {"attention", attention},
    {"attentionGrad", attention_grad},
    {"rmsNormGradX", rms_norm_grad_x},
    {"rmsNormGradW", rms_norm_grad_w},
    {"siluMulGrad", silu_mul_grad},
    {"scaleBy", scale_by},
    {"fill", fill},
    {"dot", dot},
    {"dropout", dropout},
    {"castF32", cast<float>},
    {"castBf16", cast<bf16>},
    {"castF16", cast<f16>},
    {"ropeT", rope_t},
    {"scatterRows", scatter_rows},
    {"zeroRows", zero_rows},
    {"pad", pad},
    {"crossEntropy", cross_entropy},
    {"crossEntropyGrad", cross_entropy_grad},
    {"adaptedCrossEntropy", adapted_cross_entropy},
    {"adaptedCrossEntropyGrad", adapted_cross_entropy_grad},
    {"norm", norm},
    {"clip", clip},
    {"adamw", adamw},
    {"adamw8bit", adamw8bit},
    {"accumulate", accumulate},
    {"clear", clear},
    {"mul", mul},
    {"softplus", softplus},
    {"softplusGrad", softplus_grad},
    {"scaleColumns", scale_columns},
    {"inverseNorms", inverse_norms},
    {"routerLoad", router_load},
    {"routerLoadGrad", router_load_grad},
    {nullptr, nullptr},
};

extern const KernelTable TABLE;
const KernelTable TABLE = {ISA_NAME, ENTRIES, LIMITS};

}  // namespace ISA
