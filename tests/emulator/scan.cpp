// The sequence kernels of csrc/cuda on the host, for tests/test_csrc_persistent.py: plain C functions over
// pointers.
#include <cstring>
#include <string>

#include "launch.h"

using namespace fastrnn;

namespace {

// f(cell) for the cell of that name.
template <class F>
void with_cell(const std::string& name, const F& f) {
  if (name == "lstm") f(LSTM{});
  if (name == "gru") f(GRU{});
  if (name == "rnn_tanh") f(AnyRNN{AnyRNN::tanh});
  if (name == "rnn_relu") f(AnyRNN{AnyRNN::relu});
  if (name == "rnn_leaky_relu") f(AnyRNN{AnyRNN::leaky_relu});
  if (name == "rnn_elu") f(AnyRNN{AnyRNN::elu});
}

template <class F>
void with_storage(const std::string& name, const F& f) {
  if (name == "float32") f(float{});
  if (name == "bfloat16") f(BFloat16{});
  if (name == "float16") f(Float16{});
}

// f(cell, instance) for the kernel that takes H by "cluster", "grid" or "wide_grid"; returns 0 if there is
// none.
template <class F>
int with_instance(const char* cell, const char* dtype, const char* way, int H, const F& f) {
  int found = 0;
  with_cell(cell, [&](auto cell) {
    with_storage(dtype, [&](auto zero) {
      with_bucket(H, [&](auto bucket) {
        using Cell = decltype(cell);
        using Storage = decltype(zero);
        auto run = [&](auto instance) {
          if constexpr (decltype(instance)::exists) found = 1, f(cell, instance);
        };
        if (std::string(way) == "cluster") run(ByCluster<Cell, Storage, bucket>{});
        if (std::string(way) == "grid") run(ByGrid<Cell, Storage, bucket>{});
        if (std::string(way) == "wide_grid") run(ByWideGrid<Cell, Storage, bucket>{});
        return found != 0;
      });
    });
  });
  return found;
}

struct Shape {
  int64_t T;
  int D, B, H, reverse;
};

template <class T>
T take(void**& next) {
  return static_cast<T>(*next++);
}

}  // namespace

extern "C" {

// pointers: those of ForwardParams, in its order.
int emulate_forward(const char* cell, const char* dtype, const char* way, const Shape* shape, Layout* layout,
                    void** pointers) {
  return with_instance(cell, dtype, way, shape->H, [&](auto cell, auto instance) {
    using Instance = decltype(instance);
    using Storage = typename Instance::Storage;
    void** next = pointers;
    ForwardParams<Storage> p{shape->T,
                             shape->D,
                             shape->B,
                             shape->H,
                             shape->reverse != 0,
                             take<Storage*>(next),
                             take<Storage*>(next),
                             take<Storage*>(next),
                             take<Storage*>(next),
                             take<float*>(next),
                             take<uint8_t*>(next),
                             take<Storage*>(next),
                             take<Storage*>(next),
                             take<float*>(next),
                             take<float*>(next),
                             take<Storage*>(next),
                             {}};
    launch<typename Instance::Forward, Instance>(p, cell, *layout, Instance::Tile::Forward::K);
  });
}

// pointers: those of BackwardParams, in its order.
int emulate_backward(const char* cell, const char* dtype, const char* way, const Shape* shape, Layout* layout,
                     void** pointers, float clip_value) {
  return with_instance(cell, dtype, way, shape->H, [&](auto cell, auto instance) {
    using Instance = decltype(instance);
    using Storage = typename Instance::Storage;
    void** next = pointers;
    BackwardParams<Storage> p{};
    p.T = shape->T, p.D = shape->D, p.B = shape->B, p.H = shape->H, p.reverse = shape->reverse != 0;
    p.dy = take<Storage*>(next), p.dc = take<float*>(next), p.dh_n = take<Storage*>(next),
    p.dc_n = take<float*>(next);
    p.saved = take<Storage*>(next), p.y = take<Storage*>(next), p.c = take<float*>(next),
    p.h0 = take<Storage*>(next);
    p.c0 = take<float*>(next), p.w_hh = take<Storage*>(next), p.flags = take<uint8_t*>(next);
    p.clip_norm = take<float*>(next), p.clip_value = clip_value;
    p.dgx = take<Storage*>(next), p.dgh = take<Storage*>(next), p.dh0 = take<Storage*>(next),
    p.dc0 = take<float*>(next);
    p.norms = take<float*>(next);
    launch<typename Instance::Backward, Instance>(p, cell, *layout, Instance::Tile::Backward::K);
  });
}

// sizes: bucket, units, rows, shared bytes forward and backward; 0 where there is no such kernel
int describe(const char* cell, const char* dtype, const char* way, int H, int* sizes) {
  return with_instance(cell, dtype, way, H, [&](auto, auto instance) {
    using Instance = decltype(instance);
    using Tile = typename Instance::Tile;
    int found[] = {Tile::K, Tile::units, Tile::rows, Instance::Forward::shared_bytes,
                   Instance::Backward::shared_bytes};
    std::memcpy(sizes, found, sizeof found);
  });
}

}  // extern "C"
