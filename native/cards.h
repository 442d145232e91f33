// The CUDA backend's functions for JavaScript. Knows the library only by its interface (cuda/interface.h).
#pragma once
#include <node_api.h>

#include <vector>

struct Function {
  const char* name;
  napi_callback call;
};

const std::vector<Function>& cuda_functions();
