// What library.cpp asks of the instruction-set dependent code: loops over plain pointers.
//
// isa.cpp is compiled once per instruction set (NJEPA_ISA names the namespace) and must not include
// anything with inline functions that another file also uses: the linker would keep one copy, maybe
// the one for a newer processor. Hence pointers and sizes only, no std:: containers.
//
// Letters: B batch, N patches, M blocks (or views), K kept or target tokens per block, D width.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace njepa {

// Entries of an inverted index: those of row r are order[start[r] .. start[r+1]), ascending.
struct Inverse {
  const int64_t* start;
  const int64_t* order;
};

struct Patchify {  // rows of out: b*K + k, each [3][side][side]
  const uint8_t* images;
  int64_t image, line, pixel, channel;  // strides; pixel is 1 (planes), or 3 and channel 1
  const int64_t* idx;                   // [B,K], or null for all patches in order
  void* out;
  Type type;
  float scale[3], shift[3];
  int64_t K, side, columns;  // side: of a patch in pixels, columns: patches beside each other
};

struct GatherForward {  // rows of out: b*K + k
  const void* x;
  Type type;
  const int64_t* idx;
  const float* pos;  // [N,D] or null
  void* out;
  int64_t N, K, D;
};

struct GatherBackward {  // rows: b*N + n for dx, n for dpos
  const void* grad;
  Type type;
  Inverse inverse;  // of b*N + idx, entries b*K + k
  void* dx;
  float* dpos;
  int64_t B, N, D;
};

struct PredictorForward {  // rows of out: (m*B + b)*(Kc+Kt) + token
  const void* context;
  Type type;
  const float* pos;
  const float* mask_token;
  const int64_t* context_idx;
  const int64_t* target_idx;
  const float* sigma;  // [B,M] or null
  Noise noise;
  void* out;
  int64_t B, M, Kc, Kt, D;
};

struct PredictorBackward {
  const void* grad;  // [M*B, Kc+Kt, D]
  Type type;
  const int64_t* target_idx;
  Noise noise;
  Inverse inverse;      // of the patch; entries: b*Kc + k, then B*Kc + (b*M+m)*Kt + t
  void* dcontext;       // [B,Kc,D]
  float* dmask_blocks;  // [ceil(B*M*Kt / mask_rows), D]
  float* dpos;          // [N,D] or null
  float* dsigma;        // [B,M,Kt], to be summed over the tokens, or null
  int64_t B, M, Kc, Kt, D;
  static constexpr int64_t mask_rows = 32;
};

struct JepaLoss {  // rows: (m*B + b)*Kt + t
  const void* pred;
  const void* noised;  // like pred, or null
  Type type;
  const void* h;
  Type h_type;
  const int64_t* target_idx;
  float* means;   // [rows,3] over D: both smooth-L1, squared distance; [rows,1] without noised
  void* dpred;    // slope_pred * s'(e) + pull_pred * (pred - noised), like pred, or null
  void* dnoised;  // the same with both names exchanged
  float slope_pred, slope_noised, pull_pred, pull_noised;
  float beta, eps;
  int64_t B, M, Kt, N, D;
};

struct Scale {
  const void* in;
  void* out;
  Type type;
  float factor;
};

// Columns are worked on 64 at a time, tiles are 64 x 64, and sums folded every 64 terms, on
// every instruction set and for every number of threads.
inline constexpr int64_t kBlock = 64;
inline constexpr int64_t kFold = 64;

struct VicregMoments {  // column blocks of kBlock
  const void* u;        // [M,n,D]
  Type type;
  float gamma, eps;
  float* mean;      // [M,D]
  float* std;       // [M,D]
  double* partial;  // [blocks,3]: sums of the squared spread, of the hinge, of var^2
  int64_t M, n, D;
};

// The centred views as panels: [side / panel][depth][panel], zeros beyond the edge.
struct VicregPack {
  const void* u;
  Type type;
  const float* mean;
  float* packed;
  bool samples;  // side: samples (depth: channels), or channels (depth: samples)
  int64_t M, n, D;
};

// Tiles (i <= j) of P P^T for one operand of panels.
struct Gram {  // tasks: view, then the tiles (i <= j)
  const float* packed;  // [M][panels][depth][panel]
  int64_t M, side, depth;
  bool keep_diagonal;
  double* squares;  // [tasks]: sum of the squared entries of the tile and its mirror image, or null
  float* packed_gram;  // [M][panels][side_padded][panel], both triangles, or null
};

// du = spread (u - mean_m u) + centred * channel_j + product * (A^T B)_ij
struct VicregBackward {  // tasks: (m, tile of rows, tile of columns)
  const void* u;
  Type type;
  const float* mean;
  const float* channel;    // [M,D]
  const float* a;          // panels over samples
  const float* b;          // panels over channels
  int64_t a_view, b_view;  // elements between views
  int64_t depth;
  float spread, product;
  void* du;
  int64_t M, n, D;
};

// Rows of a sum over rows that are added to one partial sum, which are then added in their order.
inline constexpr int64_t kSumRows = 32;
// Of those, rows that are summed apart first.
inline constexpr int64_t kFoldRows = 8;

struct AddLayerNorm {  // rows
  const void* x;
  Type x_type;
  const void* residual;  // or null: then the row is x, and is not written
  void* total;
  Type type;  // of residual and total
  const float* weight;
  const float* bias;
  void* out;
  Type out_type;
  float* means;     // [rows]
  float* inverses;  // [rows]: 1 / standard deviation
  float eps;
  int64_t D;
};

struct AddLayerNormBackward {  // blocks of kSumRows rows
  const void* grad;
  Type grad_type;
  const void* grad_total;  // like total, or null
  const void* total;
  Type type;
  const float* means;
  const float* inverses;
  const float* weight;
  void* dx;
  Type x_type;
  void* dresidual;  // like total, or null where dx has its type
  float* sums;      // [blocks,2,D]
  int64_t rows, D;
};

struct BiasGelu {  // rows
  const void* x;
  Type type;
  const float* bias;
  void* out;
  bool tanh;
  int64_t D;
};

struct BiasGeluBackward {  // blocks of kSumRows rows
  const void* grad;
  const void* x;
  Type type;
  const float* bias;
  void* dx;
  float* sums;  // [blocks,D]
  bool tanh;
  int64_t rows, D;
};

struct AdamwEma {
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  float* target;  // or null
  const void* grad;
  Type type;
  uint16_t* param_low;   // bf16 or null
  uint16_t* target_low;  // the same
  int64_t count;
  float scale, take1, beta2, take2, root, eps, step_size, decay, keep, take;
};

struct Ema {
  float* target;
  const void* source;
  Type type;
  uint16_t* shadow;  // bf16 or null
  int64_t count;
  float momentum, rest;
};

static constexpr int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// One table per instruction set. `scratch` is private to the call; see scratch_rows.
struct Kernels {
  const char* name;
  int64_t panel;  // width of the panels of VicregPack and Gram
  void (*patchify)(const Patchify&, int64_t, int64_t, float*);
  void (*gather_forward)(const GatherForward&, int64_t, int64_t, float*);
  void (*gather_backward)(const GatherBackward&, int64_t, int64_t, float*);
  void (*gather_backward_pos)(const GatherBackward&, int64_t, int64_t, float*);
  void (*predictor_forward)(const PredictorForward&, int64_t, int64_t, float*);
  void (*predictor_backward_context)(const PredictorBackward&, int64_t, int64_t, float*);
  void (*predictor_backward_targets)(const PredictorBackward&, int64_t, int64_t, float*);
  void (*predictor_backward_pos)(const PredictorBackward&, int64_t, int64_t, float*);
  void (*jepa_loss)(const JepaLoss&, int64_t, int64_t, float*);
  void (*scale)(const Scale&, int64_t, int64_t);
  void (*vicreg_moments)(const VicregMoments&, int64_t, int64_t);
  void (*vicreg_pack)(const VicregPack&, int64_t, int64_t);
  void (*gram)(const Gram&, int64_t, int64_t);
  void (*vicreg_backward)(const VicregBackward&, int64_t, int64_t);
  void (*ema)(const Ema&);
  void (*adamw_ema)(const AdamwEma&);
  void (*add_layer_norm)(const AddLayerNorm&, int64_t, int64_t, float*);
  void (*add_layer_norm_backward)(const AddLayerNormBackward&, int64_t, int64_t, float*);
  void (*bias_gelu)(const BiasGelu&, int64_t, int64_t);
  void (*bias_gelu_backward)(const BiasGeluBackward&, int64_t, int64_t);
  void (*normals)(uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, int64_t, float*);
};

// Scratch rows of round_up(D, 64) floats that a row kernel may use.
inline constexpr int64_t kScratchRows = 6;

namespace baseline {
const Kernels& kernels();
}
#ifdef NJEPA_X86
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace njepa
