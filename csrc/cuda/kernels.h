// What library.cpp asks of the CUDA units: launches over plain pointers. Free of torch and of CUDA.
//
// Letters: B batch, N patches, M blocks, Kc context and Kt target tokens per block, D width.
// Each function queues on `stream` and returns null, or what the runtime said about the launch.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace njepa::cuda {

using Error = const char*;  // null: none

// `vector`: every row of the main type starts on 16 bytes, and all that the call touches at least
// on an address that is a multiple of 16; else element by element.
//
// An index outside [0, N) reads and writes nothing: what it names is NaN, and gets no gradient.

struct Sizes {
  uint32_t B, M, Kc, Kt, N, D;
};

struct PredictorForward {
  const void* context;  // [B,Kc,D]
  const float* pos;
  const float* mask_token;
  const int64_t* context_idx;
  const int64_t* target_idx;
  const float* sigma;  // [B,M] or null
  Noise noise;
  void* out;  // [M*B,Kc+Kt,D]
  Sizes size;
};
Error predictor_forward(const PredictorForward& args, Type type, bool vector, void* stream);

struct ContextGradient {
  const void* grad;  // [M*B,Kc+Kt,D]
  void* dcontext;    // [B,Kc,D]
  Sizes size;
};
Error context_gradient(const ContextGradient& args, Type type, bool vector, void* stream);

inline constexpr uint32_t kTile = 512;  // columns of a thread block of the next two

struct TargetGradient {  // a thread block takes some pairs (b, m)
  const void* grad;
  const int64_t* target_idx;
  Noise noise;
  float* dmask;   // [chunks,D], to be summed over the chunks
  float* dsigma;  // [B,M,tiles of D], to be summed over the tiles, or null
  uint32_t per_chunk, chunks;
  Sizes size;
};
Error target_gradient(const TargetGradient& args, Type type, bool vector, void* stream);

// A stable counting sort of the rows of `grad` by their patch, then a sum per patch: every row is
// read once, and nothing depends on the order in which thread blocks run.
struct PosGradient {
  const void* grad;
  const int64_t* context_idx;
  const int64_t* target_idx;
  int32_t* counts;  // [chunks,N]
  int32_t* begin;   // [N+1]: where the rows of a patch are in `rows`
  int32_t* rows;    // [M*B*(Kc+Kt)]
  float* dpos;      // [N,D]
  uint32_t per_chunk, chunks;  // rows, in the order of `grad`
  Sizes size;
};
Error pos_gradient(const PosGradient& args, Type type, bool vector, void* stream);

struct ColumnSums {  // out = sum of in[row] over the rows
  const float* in;
  float* out;
  uint32_t columns, rows;
};
Error column_sums(const ColumnSums& args, bool vector, void* stream);

inline constexpr uint32_t kWidestLoss = 8192;

// So many that the one thread block of loss_terms has little to add.
inline constexpr int64_t kMostLossBlocks = 2048;

struct JepaLoss {  // rows: (m*B + b)*Kt + t
  const void* pred;
  const void* noised;  // like pred, or null
  const void* h;
  Type h_type;
  const int64_t* target_idx;
  float* partial;  // [loss_blocks,3], per row the means over D: both smooth-L1, squared distance
  void* dpred;     // slope_pred * s'(e) + pull_pred * (pred - noised), like pred, or null
  void* dnoised;   // the same with both names exchanged
  float slope_pred, slope_noised, pull_pred, pull_noised;
  float beta, eps;
  uint32_t rows;  // of a thread block: loss_rows
  Sizes size;
};
uint32_t loss_rows(const Sizes& size);
uint32_t loss_blocks(const Sizes& size);
Error jepa_loss(const JepaLoss& args, Type type, bool vector, void* stream);

struct LossTerms {  // terms: the sums of the columns over rows; loss: their weighted sum
  const float* partial;  // [blocks,3]
  float* loss;
  float* terms;  // [3] or null
  float noise_weight, consistency;
  uint32_t blocks;
  int64_t rows;
};
Error loss_terms(const LossTerms& args, void* stream);

struct Scale {  // out = in * (factor * scale) for both; nothing where that is in = out times 1
  const void* in[2];
  void* out[2];
  uint32_t tensors;
  const float* factor;
  float scale;
  int64_t count;
};
Error scale(const Scale& args, Type type, bool vector, void* stream);

// The table travels as an argument of the kernel: no copy, and a captured graph keeps its own.
// With 4 KB as the limit of older drivers.
struct EmaTable {
  static constexpr int kTensors = 96;
  static constexpr int kChunk = 4096;  // elements of a thread block
  float* target[kTensors];
  const void* source[kTensors];
  void* shadow[kTensors];  // bf16 or null
  int64_t count[kTensors];
  uint32_t first[kTensors];  // thread block
  int tensors;
  uint32_t blocks;
  float momentum, rest;
  const float* rates;  // momentum and rest on the device, or null
};
static_assert(sizeof(EmaTable) <= 4096);
Error ema(const EmaTable& table, Type source, void* stream);

}  // namespace njepa::cuda
