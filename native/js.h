// Converts values from and to JavaScript, and wraps objects for it. Knows N-API, but not what the addon does.
#pragma once
#include <node_api.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

struct Pending {};  // thrown when a JavaScript exception is pending

inline void check(napi_env env, napi_status status) {
  if (status == napi_ok) return;
  bool pending = false;
  napi_is_exception_pending(env, &pending);
  if (pending) throw Pending{};
  const napi_extended_error_info* info = nullptr;
  napi_get_last_error_info(env, &info);
  throw std::runtime_error(std::string("internal: ") + (info && info->error_message ? info->error_message : "a value of an unexpected type"));
}

inline napi_value get(napi_env env, napi_value object, const char* name) {
  napi_value v;
  check(env, napi_get_named_property(env, object, name, &v));
  return v;
}

inline double number(napi_env env, napi_value v) {
  double x;
  check(env, napi_get_value_double(env, v, &x));
  return x;
}

inline std::string text(napi_env env, napi_value v) {
  size_t n = 0;
  check(env, napi_get_value_string_utf8(env, v, nullptr, 0, &n));
  std::string s(n, 0);
  check(env, napi_get_value_string_utf8(env, v, s.data(), n + 1, &n));
  return s;
}

inline napi_value to_js(napi_env env, double x) {
  napi_value v;
  check(env, napi_create_double(env, x, &v));
  return v;
}

inline napi_value to_js(napi_env env, const std::string& s) {
  napi_value v;
  check(env, napi_create_string_utf8(env, s.c_str(), s.size(), &v));
  return v;
}

template <class T, class Convert>
std::vector<T> list(napi_env env, napi_value array, Convert convert) {
  uint32_t n = 0;
  check(env, napi_get_array_length(env, array, &n));
  std::vector<T> out;
  out.reserve(n);
  for (uint32_t i = 0; i < n; i++) {
    napi_value v;
    check(env, napi_get_element(env, array, i, &v));
    out.push_back(convert(v));
  }
  return out;
}

inline Span span(napi_env env, napi_value v) {
  napi_typedarray_type type;
  size_t n = 0, offset = 0;
  void* data = nullptr;
  napi_value buffer;
  check(env, napi_get_typedarray_info(env, v, &type, &n, &data, &buffer, &offset));
  static uint64_t nothing;  // target for empty arrays, because null means "no array"
  const size_t bytes = type == napi_uint8_array || type == napi_int8_array ? 1 : type == napi_float64_array ? 8 : 4;
  return {data ? data : &nothing, n * bytes};
}

// The same, or null if there is none.
inline Span span_or_null(napi_env env, napi_value v) {
  napi_valuetype type;
  check(env, napi_typeof(env, v, &type));
  return type == napi_null ? Span{nullptr, 0} : span(env, v);
}

template <class T>
std::vector<T> numbers(napi_env env, napi_value v) {
  Span s = span(env, v);
  return std::vector<T>(static_cast<T*>(s.data), static_cast<T*>(s.data) + s.bytes / sizeof(T));
}

// An object held by JavaScript, freed by its dispose call or with its last reference.

template <class T>
struct Handle {
  std::shared_ptr<T> object;
};

template <class T>
napi_value wrap(napi_env env, std::shared_ptr<T> object) {
  napi_value v;
  auto* handle = new Handle<T>{std::move(object)};
  check(env, napi_create_external(env, handle, [](napi_env, void* data, void*) { delete static_cast<Handle<T>*>(data); }, nullptr, &v));
  return v;
}

template <class T>
std::shared_ptr<T>& unwrap(napi_env env, napi_value v) {
  void* data = nullptr;
  check(env, napi_get_value_external(env, v, &data));
  return static_cast<Handle<T>*>(data)->object;
}

template <class T>
std::shared_ptr<T> alive(napi_env env, napi_value v, const char* what) {
  std::shared_ptr<T> object = unwrap<T>(env, v);
  if (!object) throw std::runtime_error(std::string("the ") + what + " has been disposed of");
  return object;
}
