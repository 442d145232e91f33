// The attention ops and which kernel serves which shapes.
#include "attention.cuh"

namespace cuda {
namespace attention {
void paged_write(const Operands& o, Launch& launch);
void rope_write(const Operands& o, Launch& launch);
void whole(const Operands& o, Launch& launch);

static void paged_attention(const Operands& o, Launch& launch) {
  if (decodes(o.in(1))) decode(o, 1 << 20, launch);
  else general(o, launch);
}

}  // namespace attention

const Entry ATTENTION[] = {
    {"pagedWrite", attention::paged_write},
    {"ropeWrite", attention::rope_write},
    {"pagedAttention", attention::paged_attention},
    {"attention", attention::whole},
    {nullptr, nullptr},
};

}  // namespace cuda
