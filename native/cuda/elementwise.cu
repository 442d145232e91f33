// Norms, activations, rotary embeddings, sums, casts, and ops that only move data. All but `angles` and the copies may overwrite the input
// that their row in the op table names.
#include "reduce.cuh"

namespace cuda {
namespace {

// ---- Element by element

struct Copy {
  Numbers x;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const { return load<V>(x, i); }
};

struct Add {
  Numbers a, b;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    Vec<V> x = load<V>(a, i);
    const Vec<V> y = load<V>(b, i);
#pragma unroll
    for (int v = 0; v < V; v++) x.at[v] += y.at[v];
    return x;
  }
};

struct Mul {
  Numbers a, b;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    Vec<V> x = load<V>(a, i);
    const Vec<V> y = load<V>(b, i);
#pragma unroll
    for (int v = 0; v < V; v++) x.at[v] *= y.at[v];
    return x;
  }
};

struct Scale {
  Numbers x;
  float by;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    Vec<V> y = load<V>(x, i);
#pragma unroll
    for (int v = 0; v < V; v++) y.at[v] *= by;
    return y;
  }
};

struct ScaleBy {
  Numbers x;
  const float* by;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord* f) const { return Scale{x, *by}.at<V>(i, f); }
};

struct ScaleColumns {
  Numbers x;
  const float *by, *bias;
  uint32_t n;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    Vec<V> y = load<V>(x, i);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const uint32_t c = static_cast<uint32_t>((i + v) % n);
      y.at[v] = y.at[v] * by[c] + (bias ? bias[c] : 0.f);
    }
    return y;
  }
};

struct SiluMul {
  Numbers gate, up;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    const Vec<V> g = load<V>(gate, i), u = load<V>(up, i);
    Vec<V> y;
#pragma unroll
    for (int v = 0; v < V; v++) y.at[v] = g.at[v] / (1 + expf(-g.at[v])) * u.at[v];
    return y;
  }
};

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), in float64: there are few of them.
struct Softplus {
  Numbers x;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    Vec<V> y = load<V>(x, i);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const double d = y.at[v];
      if (d == d) y.at[v] = static_cast<float>((d > 0 ? d : 0) + log1p(exp(d > 0 ? -d : d)));
    }
    return y;
  }
};

struct Fill {
  float value;
  template <int V>
  __device__ Vec<V> at(int64_t, FaultRecord*) const {
    Vec<V> y;
#pragma unroll
    for (int v = 0; v < V; v++) y.at[v] = value;
    return y;
  }
};

// Pairs of columns turned by a table of cosines and sines side by side; `direction` -1 turns back.
struct Rotate {
  Numbers x;
  const float* table;
  uint32_t n, dim;
  float direction;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    Vec<V> y = load<V>(x, i);
    const uint32_t row = static_cast<uint32_t>(i / V) / (n / V), c = static_cast<uint32_t>(i - static_cast<int64_t>(row) * n) % dim;
    const Vec<V> turn = load<V>({const_cast<float*>(table), F32}, static_cast<int64_t>(row) * dim + c);
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      const float cosine = turn.at[v], sine = direction * turn.at[v + 1], a = y.at[v], b = y.at[v + 1];
      y.at[v] = a * cosine - b * sine;
      y.at[v + 1] = b * cosine + a * sine;
    }
    return y;
  }
};

void copy(const Operands& o, Launch& launch) { map(Copy{numbers(o.in(0))}, o.out(0), aligned(numbers(o.in(0))), launch); }

template <class F>
void binary(const Operands& o, Launch& launch) {
  const Numbers a = floats(o.in(0)), b = floats(o.in(1));
  map(F{a, b}, o.out(0), aligned(a, b), launch);
}

void scale(const Operands& o, Launch& launch) {
  const Numbers x = floats(o.in(0));
  map(Scale{x, static_cast<float>(o.params[0])}, o.out(0), aligned(x), launch);
}

void scale_by(const Operands& o, Launch& launch) {
  const Numbers x = floats(o.in(0));
  map(ScaleBy{x, o.in(1).as<float>()}, o.out(0), aligned(x), launch);
}

void scale_columns(const Operands& o, Launch& launch) {
  const Numbers x = floats(o.in(0));
  map(ScaleColumns{x, o.in(1).as<float>(), o.has(2) ? o.in(2).as<float>() : nullptr, static_cast<uint32_t>(o.in(0).most[1])}, o.out(0), aligned(x), launch);
}

void softplus(const Operands& o, Launch& launch) {
  const Numbers x = floats(o.in(0));
  map(Softplus{x}, o.out(0), aligned(x), launch);
}

void fill(const Operands& o, Launch& launch) { map(Fill{static_cast<float>(o.params[0])}, o.out(0), true, launch); }

// A thread turns whole pairs.
template <int V>
__global__ void __launch_bounds__(256) rotate_kernel(Rotate f, Numbers y, Size rows) {
  let_next_start();
  const int64_t total = static_cast<int64_t>(rows.get()) * f.n;
  await_inputs();
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * V; i < total; i += static_cast<int64_t>(gridDim.x) * 256 * V) store<V>(y, i, f.at<V>(i, nullptr));
}

template <int DIRECTION>
void rotate(const Operands& o, Launch& launch) {
  const Numbers x = floats(o.in(0)), table = floats(o.in(1)), y = floats(o.out(0));
  const uint32_t n = static_cast<uint32_t>(o.in(0).most[1]), dim = static_cast<uint32_t>(o.in(1).most[1]);
  const Rotate f{x, o.in(1).as<float>(), n, dim, DIRECTION};
  const bool fours = dim % 4 == 0 && aligned(x, table, y);
  const int grid = std::max(1, ceil_div(static_cast<int64_t>(o.in(0).most[0]) * n, fours ? 1024 : 512));
  if (fours) launch(rotate_kernel<4>, dim3(grid), dim3(256), 0, f, y, o.in(0).rows());
  else launch(rotate_kernel<2>, dim3(grid), dim3(256), 0, f, y, o.in(0).rows());
}

// Cosine and sine of each pair's angle, side by side. A thread has one pair's frequency, in float32 as in the reference, and takes rows.
__global__ void angles_kernel(const int32_t* positions, float* y, Size rows, int32_t dim, double theta) {
  let_next_start();
  const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 2;
  const float frequency = 1.f / static_cast<float>(pow(theta, static_cast<double>(static_cast<float>(i) / static_cast<float>(dim))));
  const int count = rows.get();
  await_inputs();
  if (i >= dim) return;
  for (int r = blockIdx.x * blockDim.y + threadIdx.y; r < count; r += gridDim.x * blockDim.y) {
    float sine, cosine;
    sincosf(__fmul_rn(static_cast<float>(positions[r]), frequency), &sine, &cosine);
    y[static_cast<int64_t>(r) * dim + i] = cosine;
    y[static_cast<int64_t>(r) * dim + i + 1] = sine;
  }
}

void angles(const Operands& o, Launch& launch) {
  const Tensor& y = o.out(0);
  const int pairs = y.most[1] / 2, across = std::min(128, pairs), down = std::max(1, 128 / std::max(1, across));
  if (pairs == 0) return;
  const dim3 grid(std::min(std::max(1, ceil_div(y.most[0], down)), 4 * launch.multiprocessors), ceil_div(pairs, across));
  launch(angles_kernel, grid, dim3(across, down), 0, o.in(0).as<int32_t>(), y.as<float>(), y.rows(), y.most[1], o.params[1]);
}

// The sum of a * b in float64, by one block: vectors are as long as there are rows.
__global__ void dot_kernel(const float* a, const float* b, float* y, Size n) {
  __shared__ double shared[256];
  let_next_start();
  const int count = n.get();
  await_inputs();
  double total = 0;
  for (int i = threadIdx.x; i < count; i += 256) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  shared[threadIdx.x] = total;
  for (int d = 128; d; d /= 2) {
    __syncthreads();
    if (threadIdx.x < d) shared[threadIdx.x] += shared[threadIdx.x + d];
  }
  if (threadIdx.x == 0) *y = static_cast<float>(shared[0]);
}

void dot(const Operands& o, Launch& launch) { launch(dot_kernel, dim3(1), dim3(256), 0, o.in(0).as<float>(), o.in(1).as<float>(), o.out(0).as<float>(), o.in(0).rows()); }

// ---- Norms

struct Row {
  Numbers x;
  int32_t n;
  template <int V>
  __device__ Vec<V> at(int r, int c) const { return load<V>(x, static_cast<int64_t>(r) * n + c); }
};

struct RowSum {
  Add add;
  int32_t n;
  template <int V>
  __device__ Vec<V> at(int r, int c) const { return add.at<V>(static_cast<int64_t>(r) * n + c, nullptr); }
};

void rms_norm(const Operands& o, Launch& launch) {
  const Numbers x = floats(o.in(0));
  norm(Row{x, o.in(0).most[1]}, o.in(1), nullptr, o.out(0), static_cast<float>(o.params[0]), aligned(x), launch);
}

void add_rms_norm(const Operands& o, Launch& launch) {
  const Numbers a = floats(o.in(0)), b = floats(o.in(1));
  norm(RowSum{{a, b}, o.in(0).most[1]}, o.in(2), &o.out(0), o.out(1), static_cast<float>(o.params[0]), aligned(a, b), launch);
}

// ---- Rows by number

struct Gather {
  Numbers x;
  const int32_t* index;
  Size rows;
  uint32_t n;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord* faults) const {
    const uint32_t r = static_cast<uint32_t>(i / V) / (n / V);
    const int32_t from = index[r], limit = rows.get();
    if (from < 0 || from >= limit) {
      report(faults, Fault::ROW_INDEX, from, limit);
      return {};
    }
    return load<V>(x, static_cast<int64_t>(from) * n + (i - static_cast<int64_t>(r) * n));
  }
};

void gather(const Operands& o, Launch& launch) {
  const Numbers x = numbers(o.in(0));
  const int n = o.in(0).most[1];
  map(Gather{x, o.in(1).as<int32_t>(), o.in(0).rows(), static_cast<uint32_t>(n)}, o.out(0), n % 4 == 0 && aligned(x), launch);
}

enum class Change { REPLACE, ADD, ZERO };

// Row index[i] of y is replaced by row i of `by`, or becomes the sum of both, or zero.
template <Change CHANGE, int V>
__global__ void __launch_bounds__(256) change_kernel(Numbers y, Numbers by, const int32_t* index, Size rows, Size count, uint32_t n, FaultRecord* faults) {
  let_next_start();
  const int64_t total = static_cast<int64_t>(count.get()) * n;
  const int32_t limit = rows.get();
  await_inputs();
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * V; i < total; i += static_cast<int64_t>(gridDim.x) * 256 * V) {
    const uint32_t r = static_cast<uint32_t>(i / V) / (n / V);
    const int32_t to = index[r];
    if (to < 0 || to >= limit) {
      report(faults, Fault::ROW_INDEX, to, limit);
      continue;
    }
    const int64_t at = static_cast<int64_t>(to) * n + (i - static_cast<int64_t>(r) * n);
    Vec<V> x{};
    if constexpr (CHANGE != Change::ZERO) x = load<V>(by, i);
    if constexpr (CHANGE == Change::ADD) {
      const Vec<V> old = load<V>(y, at);
#pragma unroll
      for (int v = 0; v < V; v++) x.at[v] += old.at[v];
    }
    store<V>(y, at, x);
  }
}

template <Change CHANGE>
void change_rows(const Operands& o, Launch& launch) {
  const Tensor &x = o.in(0), &index = o.in(CHANGE == Change::ZERO ? 1 : 2), &out = o.out(0);
  if (out.data != x.data) copy(o, launch);
  const Numbers y = numbers(out), by = CHANGE == Change::ZERO ? y : numbers(o.in(1));
  const int n = x.most[1];
  const bool fours = n % 4 == 0 && aligned(y, by);
  // How many rows change may have no bound, so blocks take turns.
  const int grid = std::min(std::max(1, ceil_div(static_cast<int64_t>(x.most[0]) * n, fours ? 1024 : 256)), 4 * launch.multiprocessors);
  auto run = [&](auto kernel) { launch(kernel, dim3(grid), dim3(256), 0, y, by, index.as<int32_t>(), x.rows(), index.rows(), static_cast<uint32_t>(n), launch.faults); };
  if (fours) run(change_kernel<CHANGE, 4>);
  else run(change_kernel<CHANGE, 1>);
}

// ---- Shapes that the planner could not turn into views

struct Reshape {
  Numbers x;
  Count from, to;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord* faults) const {
    const int64_t given = from.get(), wanted = to.get();
    if (given != wanted) {
      report(faults, Fault::ROW_INDEX, static_cast<int32_t>(given), static_cast<int32_t>(wanted));
      return {};
    }
    return load<V>(x, i);
  }
};

void reshape(const Operands& o, Launch& launch) {
  const Tensor &x = o.in(0), &y = o.out(0);
  map(Reshape{numbers(x), elements(x), elements(y)}, y, aligned(numbers(x)), launch);
}

// The entries of an axis from `start` on, as many as `taken`; `inner` elements behind the axis.
struct Slice {
  Numbers x;
  Size taken, whole;
  Count inner;
  int32_t start;
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord* faults) const {
    const int32_t given = whole.get(), end = start + taken.get();
    if (start < 0 || end > given) {
      report(faults, Fault::ROW_INDEX, end, given);
      return {};
    }
    const int64_t each = inner.get(), run = (end - start) * each;
    return load<V>(x, i / run * given * each + start * each + i % run);
  }
};

void slice(const Operands& o, Launch& launch) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int axis = static_cast<int>(o.params[0]);
  const Count inner = elements(x, axis + 1);
  map(Slice{numbers(x), y.dims[axis], x.dims[axis], inner, static_cast<int32_t>(o.params[1])}, y, inner.times % 4 == 0 && aligned(numbers(x)), launch);
}

// Swaps two axes: element (i0, i1, ...) of y is the sum of i_d times stride_d in x.
struct Transpose {
  Numbers x;
  int32_t rank, a, b;
  Size dims[4];  // of x
  template <int V>
  __device__ Vec<V> at(int64_t i, FaultRecord*) const {
    static_assert(V == 1 || V == 4);
    Vec<V> y;
    for (int v = 0; v < V; v++) {
      int64_t from = 0, stride = 1, strides[4];
#pragma unroll
      for (int d = 3; d >= 0; d--)
        if (d < rank) strides[d] = stride, stride *= dims[d].get();
      int64_t rest = i + v;
#pragma unroll
      for (int d = 3; d >= 0; d--) {
        if (d >= rank) continue;
        const int source = d == a ? b : d == b ? a : d;
        int64_t size = 0, step = 0;
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (e == source) size = dims[e].get(), step = strides[e];
        from += rest % size * step;
        rest /= size;
      }
      y.at[v] = load<1>(x, from).at[0];
    }
    return y;
  }
};

void transpose(const Operands& o, Launch& launch) {
  const Tensor& x = o.in(0);
  Transpose f{numbers(x), x.rank, static_cast<int32_t>(o.params[0]), static_cast<int32_t>(o.params[1]), {}};
  for (int d = 0; d < x.rank; d++) f.dims[d] = x.dims[d];
  map(f, o.out(0), false, launch);
}

}  // namespace

extern const Entry ELEMENTWISE[] = {
    {"rmsNorm", rms_norm},
    {"addRmsNorm", add_rms_norm},
    {"add", binary<Add>},
    {"mul", binary<Mul>},
    {"siluMul", binary<SiluMul>},
    {"scale", scale},
    {"scaleBy", scale_by},
    {"scaleColumns", scale_columns},
    {"softplus", softplus},
    {"fill", fill},
    {"dot", dot},
    {"castF32", copy},
    {"castBf16", copy},
    {"castF16", copy},
    {"angles", angles},
    {"rope", rotate<1>},
    {"ropeT", rotate<-1>},
    {"gather", gather},
    {"replaceRows", change_rows<Change::REPLACE>},
    {"addRows", change_rows<Change::ADD>},
    {"zeroRows", change_rows<Change::ZERO>},
    {"reshape", reshape},
    {"slice", slice},
    {"transpose", transpose},
    {nullptr, nullptr},
};

}  // namespace cuda
