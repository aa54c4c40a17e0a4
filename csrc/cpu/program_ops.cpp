#include "program_ops.h"

#include <cmath>
#include <cstring>

#include "functions.h"
#include "vectors.h"

namespace fastrnn {
namespace {

// --- the operations, element by element -----------------------------------------------------------

#define FASTRNN_UNARY(Name, expression) \
  struct Name {                         \
    static constexpr int operands = 1;  \
    template <class A>                  \
    static FASTRNN_INLINE A of(A x) {   \
      return expression;                \
    }                                   \
  };
#define FASTRNN_BINARY(Name, expression)   \
  struct Name {                            \
    static constexpr int operands = 2;     \
    template <class A>                     \
    static FASTRNN_INLINE A of(A x, A y) { \
      return expression;                   \
    }                                      \
  };

FASTRNN_BINARY(Add, x + y)
FASTRNN_BINARY(Sub, x - y)
FASTRNN_BINARY(Mul, (x) * (y))
FASTRNN_BINARY(Div, x / y)
FASTRNN_BINARY(Pow, std::pow(x, y))
FASTRNN_BINARY(Maximum, x > y || x != x ? x : y)  // NaN if either is
FASTRNN_BINARY(Minimum, x < y || x != x ? x : y)

FASTRNN_UNARY(Neg, -x)
FASTRNN_UNARY(Abs, std::abs(x))
FASTRNN_UNARY(Sign, A(x > A(0)) - A(x < A(0)))  // 0 for NaN, as in torch
FASTRNN_UNARY(Exp, exp_of(x))
FASTRNN_UNARY(Expm1, expm1_of(x))
FASTRNN_UNARY(Log, log_of(x))
FASTRNN_UNARY(Log1p, log1p_of(x))
FASTRNN_UNARY(Sqrt, std::sqrt(x))
FASTRNN_UNARY(Sigmoid, sigmoid(x))
FASTRNN_UNARY(Tanh, tanh_of(x))
FASTRNN_UNARY(Erf, std::erf(x))
FASTRNN_UNARY(Sin, std::sin(x))
FASTRNN_UNARY(Cos, std::cos(x))

FASTRNN_BINARY(Lt, x < y ? A(1) : A(0))
FASTRNN_BINARY(Le, x <= y ? A(1) : A(0))
FASTRNN_BINARY(Gt, x > y ? A(1) : A(0))
FASTRNN_BINARY(Ge, x >= y ? A(1) : A(0))
FASTRNN_BINARY(Eq, x == y ? A(1) : A(0))
FASTRNN_BINARY(Ne, x != y ? A(1) : A(0))
FASTRNN_BINARY(And, (x) * (y))
FASTRNN_BINARY(Or, x > y ? x : y)
FASTRNN_UNARY(Not, A(1) - x)

struct Where {
  static constexpr int operands = 3;
  template <class A>
  static FASTRNN_INLINE A of(A condition, A x, A y) {
    return condition != A(0) ? x : y;
  }
};

// --- loops ----------------------------------------------------------------------------------------

template <class Op, class A>
struct Elements {
  static FASTRNN_INLINE void run(void* out, const void* x, const void* y, const void* z, int64_t n) {
    A* to = static_cast<A*>(out);
    const A *first = static_cast<const A*>(x), *second = static_cast<const A*>(y),
            *third = static_cast<const A*>(z);
    FASTRNN_SIMD
    for (int64_t j = 0; j < n; ++j) {
      if constexpr (Op::operands == 1) to[j] = Op::of(first[j]);
      if constexpr (Op::operands == 2) to[j] = Op::of(first[j], second[j]);
      if constexpr (Op::operands == 3) to[j] = Op::of(first[j], second[j], third[j]);
    }
  }
};

template <class A>
struct CopyPlane {
  static FASTRNN_INLINE void run(void* out, const void* x, const void*, const void*, int64_t n) {
    std::memmove(out, x, n * sizeof(A));
  }
};

template <class Body>
FASTRNN_TARGET(FASTRNN_AVX512)
void run_avx512(void* out, const void* x, const void* y, const void* z, int64_t n) {
  Body::run(out, x, y, z, n);
}

template <class Body>
FASTRNN_TARGET("avx2,fma")
void run_avx2(void* out, const void* x, const void* y, const void* z, int64_t n) {
  Body::run(out, x, y, z, n);
}

template <class Body>
void run_baseline(void* out, const void* x, const void* y, const void* z, int64_t n) {
  Body::run(out, x, y, z, n);
}

template <class Body>
Loop widest() {
  static const Vectors vectors = widest_vectors();
  return vectors == Vectors::avx512 ? run_avx512<Body>
         : vectors == Vectors::avx2 ? run_avx2<Body>
                                    : run_baseline<Body>;
}

// --- the table ------------------------------------------------------------------------------------

using Kind = Operation::Kind;
constexpr Kind number = Kind::number, condition = Kind::condition;

template <class Op>
Operation row(std::string_view name, Kind operands = number, Kind result = number) {
  return {name,
          Op::operands,
          {operands, operands, operands},
          result,
          widest<Elements<Op, float>>(),
          widest<Elements<Op, double>>()};
}

Operation where() {
  Operation found = row<Where>("where");
  found.of_operands[0] = condition;
  return found;
}

}  // namespace

const Operation* find_operation(std::string_view name) {
  static const Operation table[] = {
      row<Add>("add"),
      row<Sub>("sub"),
      row<Mul>("mul"),
      row<Div>("div"),
      row<Pow>("pow"),
      row<Maximum>("maximum"),
      row<Minimum>("minimum"),
      row<Neg>("neg"),
      row<Abs>("abs"),
      row<Sign>("sign"),
      row<Exp>("exp"),
      row<Expm1>("expm1"),
      row<Log>("log"),
      row<Log1p>("log1p"),
      row<Sqrt>("sqrt"),
      row<Sigmoid>("sigmoid"),
      row<Tanh>("tanh"),
      row<Erf>("erf"),
      row<Sin>("sin"),
      row<Cos>("cos"),
      row<Lt>("lt", number, condition),
      row<Le>("le", number, condition),
      row<Gt>("gt", number, condition),
      row<Ge>("ge", number, condition),
      row<Eq>("eq", number, condition),
      row<Ne>("ne", number, condition),
      row<And>("and", condition, condition),
      row<Or>("or", condition, condition),
      row<Not>("not", condition, condition),
      where(),
  };
  for (const Operation& operation : table)
    if (operation.name == name) return &operation;
  return nullptr;
}

Loop copy_loop(bool is_double) {
  return is_double ? run_baseline<CopyPlane<double>> : run_baseline<CopyPlane<float>>;
}

}  // namespace fastrnn
