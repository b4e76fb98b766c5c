// What the parts of the fuzzer share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"

using namespace tidemill;

inline std::mt19937 random_bits;

inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
inline float normal() { return std::normal_distribution<float>()(random_bits); }
inline std::vector<float> normals(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = normal();
  return values;
}

[[noreturn]] inline void fail(const char* what, int64_t number, double got, double want) {
  std::fprintf(stderr, "%s: case %lld: got %.9g, expected %.9g\n", what, static_cast<long long>(number), got, want);
  std::exit(1);
}

void fuzz_linear(int64_t number, Pool& pool);
