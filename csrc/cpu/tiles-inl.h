// The kernels that the amx level has instead of AVX-512's, over the instructions of amx.h.
#pragma once

#include "attention-tiles-inl.h"
#include "bf16-tiles-inl.h"
#include "quant-tiles-inl.h"

namespace gemma {
namespace GEMMA_ISA {

void use_tiles(Kernels& k) {
  other_panel = k.panel;
  k.panel = panel;
  k.pack = tile_pack;
  k.pack_bytes = tile_bytes;
  k.bf16 = nullptr;
  k.bf16_scratch = tile_room;
  k.tiles = tiles;
  k.peak_bf16 = tile_peak;
  other_attend = k.attend;
  k.attend = tile_attend;
  k.queries = tile_queries;
}

}  // namespace GEMMA_ISA
}  // namespace gemma
