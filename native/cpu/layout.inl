// Ops that only move data: gathers, row replacement, and the copies that the planner could not turn into views. Elements
// are 4 bytes, floats or integers.

namespace ISA {

static void gather(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &index = o.in(1), &y = o.out(0);
  const int64_t n = x.dims[1];
  for (int64_t r = worker.index; r < y.rows(); r += worker.count) {
    const int32_t from = index.as<int32_t>()[r];
    if (from < 0 || from >= x.rows()) worker.fail("internal: gather: row %lld of %lld", from, x.rows());
    else for (int64_t i = 0; i < n; i++) y.as<float>()[r * n + i] = x.as<float>()[from * n + i];
  }
}

// y = x with row index[i] replaced by rows[i]. `y` may be `x`; then only the replacement rows are copied, usually none.
static void replace_rows(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &rows = o.in(1), &index = o.in(2), &y = o.out(0);
  const int64_t n = x.dims[1];
  int64_t begin, end;
  worker.share(x.rows(), 1, begin, end);
  const size_t bytes = static_cast<size_t>(n) * 4;
  if (y.data != x.data) __builtin_memcpy(y.as<float>() + begin * n, x.as<float>() + begin * n, static_cast<size_t>(end - begin) * bytes);
  for (int64_t i = 0; i < index.rows(); i++) {
    const int32_t to = index.as<int32_t>()[i];
    if (to < 0 || to >= x.rows()) worker.fail("internal: replaceRows: row %lld of %lld", to, x.rows());
    else if (to >= begin && to < end) __builtin_memcpy(y.as<float>() + to * n, rows.as<float>() + i * n, bytes);
  }
}

// y = x with row i of `rows` added to row index[i]; no row occurs twice. `y` may be `x`; then other rows cost nothing.
static void add_rows(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &rows = o.in(1), &index = o.in(2), &y = o.out(0);
  const int64_t n = x.dims[1];
  int64_t begin, end;
  if (y.data != x.data) {
    worker.share(x.rows() * n, 16, begin, end);
    __builtin_memcpy(y.as<float>() + begin, x.as<float>() + begin, static_cast<size_t>(end - begin) * 4);
    worker.wait();
  }
  worker.share(index.rows() * n, 16, begin, end);
  for (int64_t i = begin; i < end;) {
    const int64_t r = i / n, c = i % n, run = min(end - i, n - c);
    const int32_t to = index.as<int32_t>()[r];
    if (to < 0 || to >= x.rows()) return worker.fail("internal: addRows: row %lld of %lld", to, x.rows());
    float* at = y.as<float>() + to * n + c;
    for (int64_t j = 0; j < run; j++) at[j] += rows.as<float>()[i + j];
    i += run;
  }
}

// The expert slots of rows with an adapter, and each slot's (adapter, expert) as one number.
static void adapted_slots(const Operands& o, const Worker& worker) {
  if (worker.index) return;
  const Tensor &experts = o.in(0), &rows = o.in(1), &ids = o.in(2), &keys = o.out(0), &slots = o.out(1);
  const int64_t k = experts.dims[1], count = static_cast<int64_t>(o.params[0]);
  for (int64_t i = 0; i < rows.rows(); i++) {
    const int64_t r = rows.as<int32_t>()[i], id = ids.as<int32_t>()[i];
    if (r < 0 || r >= experts.rows()) return worker.fail("internal: adaptedSlots: row %lld of %lld", r, experts.rows());
    for (int64_t j = 0; j < k; j++) {
      keys.as<int32_t>()[i * k + j] = static_cast<int32_t>(id * count + experts.as<int32_t>()[r * k + j]);
      slots.as<int32_t>()[i * k + j] = static_cast<int32_t>(r * k + j);
    }
  }
}

// Copies elements [begin, end) of y in runs that are contiguous in x: `place(i, run)` returns the source of y[i] and
// shortens `run` to the elements that follow it there.
template <class Place>
static inline void copy_runs(const Tensor& y, const int32_t* x, const Worker& worker, Place place) {
  int64_t begin, end;
  worker.share(y.rows() * y.width(), 16, begin, end);
  for (int64_t i = begin; i < end;) {
    int64_t run = end - i;
    const int64_t from = place(i, run);
    __builtin_memcpy(y.as<int32_t>() + i, x + from, static_cast<size_t>(run) * 4);
    i += run;
  }
}

static void reshape(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  if (x.rows() * x.width() != y.rows() * y.width()) return worker.fail("internal: reshape: %lld numbers to %lld", x.rows() * x.width(), y.rows() * y.width());
  copy_runs(y, x.as<int32_t>(), worker, [](int64_t i, int64_t&) { return i; });
}

// y takes x's entries along `axis`, from `start` on, as many as its shape says.
static void slice(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int axis = static_cast<int>(o.params[0]);
  const int64_t start = static_cast<int64_t>(o.params[1]);
  if (start < 0 || start + y.dims[axis] > x.dims[axis]) return worker.fail("internal: slice: ends at %lld of %lld", start + y.dims[axis], x.dims[axis]);
  int64_t inner = 1;
  for (int d = axis + 1; d < x.rank; d++) inner *= x.dims[d];
  const int64_t taken = y.dims[axis] * inner, whole = x.dims[axis] * inner;
  copy_runs(y, x.as<int32_t>(), worker, [&](int64_t i, int64_t& run) {
    run = min(run, taken - i % taken);
    return i / taken * whole + start * inner + i % taken;
  });
}

// Swaps two axes.
static void transpose(const Operands& o, const Worker& worker) {
  const Tensor &x = o.in(0), &y = o.out(0);
  const int a = static_cast<int>(o.params[0]), b = static_cast<int>(o.params[1]), rank = y.rank;
  int64_t strides[4];  // in x, of y's axes
  for (int64_t d = rank - 1, stride = 1; d >= 0; stride *= x.dims[d--]) strides[d] = stride;
  const int64_t kept = strides[a];
  strides[a] = strides[b], strides[b] = kept;
  const int64_t n = y.dims[rank - 1];
  int64_t begin, end;
  worker.share(n ? y.rows() * y.width() / n : 0, 1, begin, end);
  for (int64_t row = begin; row < end; row++) {
    int64_t from = 0, rest = row;
    for (int d = rank - 2; d >= 0; rest /= y.dims[d--]) from += rest % y.dims[d] * strides[d];
    const int32_t* in = x.as<int32_t>() + from;
    for (int64_t i = 0; i < n; i++) y.as<int32_t>()[row * n + i] = in[i * strides[rank - 1]];
  }
}

}  // namespace ISA
