// What the native test programs need and no more: named cases, checks that print both sides, an exit status.
//
//     TIDEGATE_TEST(a_full_queue_refuses) { CHECK_EQ(queue.View().waiting, 4u); }
//     int main(int argc, char** argv) { return tidegate::test::RunAll(argc, argv); }
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace tidegate::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& Cases() {
  static std::vector<Case> cases;
  return cases;
}

struct Registration {
  Registration(const char* name, void (*run)()) { Cases().push_back({name, run}); }
};

// A failed check ends the program: what follows would only report the same mistake again. At once, without destructors:
// it may come from any thread while the others run.
[[noreturn]] inline void Fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::fflush(nullptr);
  std::_Exit(1);
}

template <typename A, typename B>
void CheckEq(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": " << a << " is not " << b;
  Fail(file, line, out.str());
}

// Runs the cases whose name contains the first argument; all without one. Running none is a failure.
inline int RunAll(int argc, char** argv) {
  int ran = 0;
  for (const Case& one : Cases()) {
    if (argc > 1 && std::strstr(one.name, argv[1]) == nullptr) continue;
    std::printf("%s\n", one.name);
    std::fflush(stdout);
    one.run();
    ++ran;
  }
  std::printf("%d passed\n", ran);
  return ran > 0 ? 0 : 1;
}

}  // namespace tidegate::test

#define TIDEGATE_TEST(name)                                                      \
  static void name();                                                            \
  static const ::tidegate::test::Registration name##_registration(#name, &name); \
  static void name()

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) ::tidegate::test::Fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_EQ(a, b) ::tidegate::test::CheckEq((a), (b), #a " == " #b, __FILE__, __LINE__)
