// Compiled into release wheels (.ci/wheels.sh): definitions of the symbols that GCC 12 on glibc 2.36
// would take from a newer glibc or libstdc++ than manylinux_2_28 promises (glibc 2.28, GLIBCXX 3.4.24). They
// are hidden, so the library uses them and no other one sees them. auditwheel names a symbol that is missing
// here.

#include <new>
#include <sstream>
#include <string>
#include <string_view>

#define HIDDEN_AS(name) __asm__(name) __attribute__((visibility("hidden")))

extern "C" {
// glibc 2.29 has other versions of these, which leave errno alone.
#if defined(__x86_64__)
#define BEFORE_2_29(name) __asm__(".symver " #name "_before_2_29, " #name "@GLIBC_2.2.5")
#elif defined(__aarch64__)
#define BEFORE_2_29(name) __asm__(".symver " #name "_before_2_29, " #name "@GLIBC_2.17")
#endif
double exp_before_2_29(double x), log_before_2_29(double x), pow_before_2_29(double x, double y);
BEFORE_2_29(exp);
BEFORE_2_29(log);
BEFORE_2_29(pow);
double own_exp(double x) HIDDEN_AS("exp");
double own_exp(double x) { return exp_before_2_29(x); }
double own_log(double x) HIDDEN_AS("log");
double own_log(double x) { return log_before_2_29(x); }
double own_pow(double x, double y) HIDDEN_AS("pow");
double own_pow(double x, double y) { return pow_before_2_29(x, y); }

// glibc 2.32: reference counts of libstdc++ may skip atomics where this is not 0.
extern char own_single_threaded HIDDEN_AS("__libc_single_threaded");
char own_single_threaded = 0;

// GLIBCXX_3.4.29
[[noreturn]] void own_bad_array_new_length() HIDDEN_AS("_ZSt28__throw_bad_array_new_lengthv");
void own_bad_array_new_length() { throw std::bad_array_new_length(); }

// GLIBCXX_3.4.26: a string as a string_view, where it is not inlined; and the default constructors of
// streams: those that take a mode are older.
std::string_view own_view(const std::string* self)
    HIDDEN_AS("_ZNKSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEcvSt17basic_string_viewIcS2_EEv");
std::string_view own_view(const std::string* self) { return {self->data(), self->size()}; }
void own_stringstream(void* self)
    HIDDEN_AS("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void own_stringstream(void* self) { new (self) std::stringstream(std::ios_base::out | std::ios_base::in); }
void own_ostringstream(void* self)
    HIDDEN_AS("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void own_ostringstream(void* self) { new (self) std::ostringstream(std::ios_base::out); }
}
