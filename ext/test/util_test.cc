// The small parts that everything else stands on: timers, limits, texts, decompression, locks, waking.

#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "grpc/inflate.h"
#include "grpc/percent.h"
#include "grpc/timeout.h"
#include "net/budget.h"
#include "net/outbox.h"
#include "slow/slow_queue.h"
#include "test/check.h"
#include "test/json.h"
#include "test/random.h"
#include "util/log.h"
#include "util/quiescence.h"
#include "util/ranked_mutex.h"
#include "util/timer_wheel.h"
#include "util/token_bucket.h"
#include "util/utf8.h"

namespace tidegate::test {
namespace {

constexpr int64_t kMs = 1'000'000;

// ---- timer wheel ----------------------------------------------------------------------------------------------------

TIDEGATE_TEST(a_timer_fires_within_a_tick_of_its_time_and_never_before) {
  for (const int64_t due_ns : {5 * kMs, 5 * kMs + 1, 1023 * kMs, 1024 * kMs, 5000 * kMs + 7}) {
    TimerWheel wheel(0);
    TimerNode node;
    wheel.Insert(&node, due_ns);
    int fired = 0;
    for (int64_t now_ns = 0; now_ns < due_ns; now_ns += kMs / 4) wheel.Advance(now_ns, [&](TimerNode*) { ++fired; });
    wheel.Advance(due_ns - 1, [&](TimerNode*) { ++fired; });
    CHECK_EQ(fired, 0);
    wheel.Advance(due_ns + kMs, [&](TimerNode* expired) {
      CHECK(expired == &node);
      ++fired;
    });
    CHECK_EQ(fired, 1);
    CHECK(!node.linked());
    CHECK(wheel.empty());
  }
}

TIDEGATE_TEST(a_timer_of_the_past_fires_at_the_next_tick_even_after_a_long_pause) {
  TimerWheel wheel(1'000'000 * kMs);
  TimerNode node;
  wheel.Insert(&node, 3 * kMs);
  int fired = 0;
  wheel.Advance(9'000'000 * kMs, [&](TimerNode*) { ++fired; });
  CHECK_EQ(fired, 1);
  wheel.Insert(&node, 0);
  CHECK(wheel.NextNs(9'000'000 * kMs) <= kMs);
  wheel.Advance(9'000'001 * kMs, [&](TimerNode*) { ++fired; });
  CHECK_EQ(fired, 2);
  wheel.Insert(&node, kNever);
  wheel.Advance(99'000'000 * kMs, [&](TimerNode*) { ++fired; });
  CHECK_EQ(fired, 2);
  wheel.Remove(&node);
  CHECK_EQ(wheel.NextNs(99'000'000 * kMs), kNever);
}

TIDEGATE_TEST(what_fires_may_insert_and_remove_others) {
  TimerWheel wheel(0);
  TimerNode first, second, third;
  wheel.Insert(&first, 2 * kMs);
  wheel.Insert(&second, 2 * kMs);
  int fired = 0;
  wheel.Advance(10 * kMs, [&](TimerNode* node) {
    ++fired;
    if (node == &third) return;
    CHECK(node == &first);
    wheel.Remove(&second);
    wheel.Insert(&third, 5 * kMs);  // due already: later in the same sweep
  });
  CHECK_EQ(fired, 2);
  CHECK(wheel.empty());
}

TIDEGATE_TEST(a_wheel_does_what_a_sorted_list_does) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Random random(seed);
    int64_t now_ns = static_cast<int64_t>(random.Below(1'000'000)) * 1000;
    TimerWheel wheel(now_ns);
    std::vector<TimerNode> nodes(60);
    std::map<TimerNode*, int64_t> expected;
    for (int step = 0; step < 3000; ++step) {
      TimerNode* node = &nodes[random.Below(nodes.size())];
      switch (random.Below(4)) {
        case 0:
        case 1:
          if (node->linked()) break;
          expected[node] = now_ns + static_cast<int64_t>(random.Below(random.OneIn(4) ? 4000 * kMs : 20 * kMs)) - kMs;
          wheel.Insert(node, expected[node]);
          break;
        case 2:
          wheel.Remove(node);
          expected.erase(node);
          break;
        case 3: {
          const int64_t next_ns = wheel.NextNs(now_ns);
          // Waking when the wheel says so is soon enough for whatever comes first.
          for (const auto& [waiting, due_ns] : expected) CHECK(next_ns <= std::max<int64_t>(due_ns - now_ns, 0) + kMs);
          now_ns += random.OneIn(10) ? static_cast<int64_t>(random.Below(3000 * kMs)) : std::min(next_ns, 5 * kMs);
          wheel.Advance(now_ns, [&](TimerNode* expired) {
            CHECK(expected.contains(expired));
            CHECK(expected[expired] <= now_ns);
            expected.erase(expired);
          });
          for (const auto& [waiting, due_ns] : expected) CHECK(due_ns > now_ns - kMs);
          break;
        }
      }
      CHECK_EQ(wheel.empty(), expected.empty());
    }
  }
}

// ---- token bucket
// -----------------------------------------------------------------------------------------------------

TIDEGATE_TEST(a_bucket_gives_its_burst_and_then_its_rate) {
  TokenBucket bucket(10, 100);
  int64_t now_ns = 5'000'000'000;
  for (int i = 0; i < 10; ++i) CHECK(bucket.Take(now_ns));
  CHECK(!bucket.Take(now_ns));
  CHECK(!bucket.Take(now_ns + 9 * kMs));
  CHECK(bucket.Take(now_ns + 10 * kMs));
  CHECK(!bucket.Take(now_ns + 10 * kMs));
  // A long rest fills it to the brim and no further.
  now_ns += 3'600'000'000'000;
  for (int i = 0; i < 10; ++i) CHECK(bucket.Take(now_ns));
  CHECK(!bucket.Take(now_ns));
}

TIDEGATE_TEST(a_bucket_that_is_asked_often_loses_nothing_of_its_rate) {
  TokenBucket bucket(1, 100);
  int64_t now_ns = 0;
  int taken = 0;
  for (; now_ns < 10'000'000'000; now_ns += 7 * kMs) taken += bucket.Take(now_ns);
  CHECK(taken >= 990 && taken <= 1002);
}

// ---- texts ----------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(utf8_is_told_from_what_is_not) {
  for (const std::string_view one :
       {"a", "\x7f", "\xC3\xA4", "\xE2\x82\xAC", "\xF0\x9F\x8C\x8A", "\xEF\xBF\xBD", "\xF4\x8F\xBF\xBF"}) {
    CHECK_EQ(Utf8Length(one), one.size());
    CHECK_EQ(Utf8Length(std::string(one) + "x"), one.size());
    if (one.size() > 1) CHECK_EQ(Utf8Length(one.substr(0, one.size() - 1)), 0u);
  }
  // Tails alone, overlong forms, surrogates, beyond the last character, cut.
  for (const std::string_view none :
       {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x80\x80\x80",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF", "\xC3x"}) {
    CHECK_EQ(Utf8Length(none), 0u);
  }
}

std::string PercentDecode(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out.push_back(text[i]);
      continue;
    }
    CHECK(i + 2 < text.size());
    out.push_back(static_cast<char>(std::strtoul(std::string(text.substr(i + 1, 2)).c_str(), nullptr, 16)));
    i += 2;
  }
  return out;
}

TIDEGATE_TEST(a_grpc_message_survives_the_wire) {
  CHECK_EQ(PercentEncode("plain text!"), "plain text!");
  CHECK_EQ(PercentEncode("100%\t\n"), "100%25%09%0A");
  CHECK_EQ(PercentEncode("\x7f\x1f ~"), "%7F%1F ~");
  const std::string text = "caf\xC3\xA9 \xF0\x9F\x8C\x8A %41 \r\n";
  const std::string wire = GrpcMessage(text, 100);
  for (const char c : wire) CHECK(c >= 0x20 && c <= 0x7E);
  CHECK_EQ(PercentDecode(wire), text);
}

TIDEGATE_TEST(a_grpc_message_is_cut_between_characters_and_what_is_no_text_is_replaced) {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC";  // 1 + 2 + 3 bytes
  const size_t ends[] = {0, 1, 1, 3, 3, 3, 6, 6};
  for (size_t most = 0; most < std::size(ends); ++most) {
    CHECK_EQ(PercentDecode(GrpcMessage(text, most)), text.substr(0, ends[most]));
  }
  CHECK_EQ(PercentDecode(GrpcMessage("x\xFFy", 10)), "x\xEF\xBF\xBDy");
  CHECK_EQ(PercentDecode(GrpcMessage("x\xFFy", 3)), "x");
}

TIDEGATE_TEST(grpc_timeouts_are_read_as_the_specification_says) {
  const std::pair<std::string_view, int64_t> good[] = {{"1n", 1},
                                                       {"7u", 7'000},
                                                       {"20m", 20'000'000},
                                                       {"3S", 3'000'000'000},
                                                       {"0S", 0},
                                                       {"00000001S", 1'000'000'000},
                                                       {"2M", 120'000'000'000},
                                                       {"1H", 3'600'000'000'000},
                                                       {"99999999n", 99'999'999}};
  for (const auto& [text, ns] : good) CHECK_EQ(ParseGrpcTimeout(text), ns);
  for (const std::string_view most : {"99999999H", "99999999M"})
    CHECK(ParseGrpcTimeout(most) > 100 * INT64_C(31'536'000'000'000'000));
  for (const std::string_view bad :
       {"", "1", "S", "1s", "1x", "-1S", "+1S", " 1S", "1S ", "1.5S", "123456789S", "0x1S", "1Sm"}) {
    CHECK_EQ(ParseGrpcTimeout(bad), -1);
  }
}

// ---- log line -------------------------------------------------------------------------------------------------------

std::string LogLine(std::string_view message, const std::vector<LogField>& fields = {}) {
  std::vector<char> line(kMaxLogLine);
  const size_t size = FormatLogLine(1'700'000'000'123, LogLevel::kWarning, "native.net", message, fields,
                                    std::span<char, kMaxLogLine>(line.data(), kMaxLogLine));
  CHECK(size <= kMaxLogLine);
  return {line.data(), size};
}

// The one JSON object that a line is.
Json Parsed(const std::string& line) {
  CHECK(line.ends_with("}\n"));
  CHECK_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  const std::unique_ptr<Json> json = Json::Parse(line);
  if (!json) Fail(__FILE__, __LINE__, "not JSON: " + line);
  return *json;
}

TIDEGATE_TEST(a_log_line_is_one_object_with_what_was_said) {
  const Json json = Parsed(LogLine("it \"is\" a \\ tab\t", {{"model", "m\n1"}, {"peer", "[::1]:5"}}));
  CHECK_EQ(json["ts"].text, "2023-11-14T22:13:20.123Z");
  CHECK_EQ(json["level"].text, "warning");
  CHECK_EQ(json["logger"].text, "native.net");
  CHECK_EQ(json["message"].text, "it \"is\" a \\ tab\t");
  CHECK_EQ(json["model"].text, "m\n1");
  CHECK_EQ(json["peer"].text, "[::1]:5");
  CHECK_EQ(json.members.size(), 6u);
}

TIDEGATE_TEST(a_log_line_that_is_too_long_is_cut_and_stays_an_object) {
  for (size_t size = 3900; size < 4300; ++size) Parsed(LogLine(std::string(size, 'x')));
  for (size_t size = 1900; size < 2200; ++size) {
    // A character of two bytes at every place: none is cut in the middle.
    const Json json = Parsed(LogLine(std::string(size, 'x') + "\xC3\xA9\xC3\xA9", {{"model", "m"}}));
    CHECK_EQ(json["model"].text, "m");
  }
  // A field that does not fit is left out whole; those after it may fit.
  const Json json = Parsed(LogLine("short", {{"long", std::string(5000, 'y')}, {"model", "m"}}));
  CHECK(!json.has("long"));
  CHECK_EQ(json["model"].text, "m");
}

TIDEGATE_TEST(any_bytes_make_a_log_line) {
  Random random(7);
  for (int round = 0; round < 400; ++round) {
    std::string bytes[3];
    for (std::string& text : bytes) {
      text.resize(random.Below(round % 10 == 0 ? 5000 : 60));
      for (char& c : text) c = static_cast<char>(random.Next());
    }
    Parsed(LogLine(bytes[0], {{"field", bytes[1]}, {"other", bytes[2]}}));
  }
}

// ---- decompression
// ----------------------------------------------------------------------------------------------------

std::vector<std::byte> Compressed(std::string_view bytes, int window_bits) {
  z_stream stream{};
  CHECK(deflateInit2(&stream, 6, Z_DEFLATED, window_bits, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  std::vector<std::byte> out(deflateBound(&stream, bytes.size()));
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  CHECK(deflate(&stream, Z_FINISH) == Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}
constexpr int kZlib = 15;
constexpr int kGzip = 15 + 16;

std::string Text(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

TIDEGATE_TEST(messages_of_every_size_open_to_what_they_were) {
  Random random(3);
  for (const size_t size : {0u, 1u, 100u, 16383u, 16384u, 16385u, 32768u, 100'000u, 3'000'000u}) {
    std::string text(size, '\0');
    for (char& c : text) c = static_cast<char>(random.Below(20));
    for (const int format : {kZlib, kGzip}) {
      std::vector<std::byte> out(5);
      CHECK(Inflate(Compressed(text, format), 4'000'000, &out).ok());
      CHECK(Text(out) == text);
    }
  }
}

TIDEGATE_TEST(the_limit_counts_what_a_message_opens_to) {
  const std::string text(100'000, 'a');
  std::vector<std::byte> out;
  for (const int format : {kZlib, kGzip}) {
    const std::vector<std::byte> message = Compressed(text, format);
    CHECK(Inflate(message, text.size() + 1, &out).ok());
    CHECK(Inflate(message, text.size(), &out).ok());
    CHECK(Inflate(message, text.size() - 1, &out).reason == Reason::kMessageTooLarge);
    CHECK(out.empty());
    CHECK(Inflate(message, 0, &out).reason == Reason::kMessageTooLarge);
  }
}

TIDEGATE_TEST(a_bomb_is_stopped_at_the_limit) {
  const std::vector<std::byte> bomb = Compressed(std::string(64 << 20, '\0'), kGzip);
  CHECK(bomb.size() < 100'000);
  std::vector<std::byte> out;
  CHECK(Inflate(bomb, 1 << 20, &out).reason == Reason::kMessageTooLarge);
  CHECK(out.capacity() <= 2u << 20);
}

TIDEGATE_TEST(a_damaged_message_is_refused) {
  const std::string text = "the quick brown fox jumps over the lazy dog, again and again and again";
  std::vector<std::byte> out;
  for (const int format : {kZlib, kGzip}) {
    const std::vector<std::byte> whole = Compressed(text, format);
    for (size_t cut = 0; cut < whole.size(); ++cut) {
      const std::span<const std::byte> part(whole.data(), cut);
      CHECK(Inflate(part, 10'000, &out).reason == Reason::kInternal);
      CHECK(out.empty());
    }
    std::vector<std::byte> more = whole;
    more.push_back(std::byte{0});
    CHECK(Inflate(more, 10'000, &out).reason == Reason::kInternal);
    // A changed bit is found by the checksum, or is in a part of the header that means nothing.
    for (size_t at = 0; at < whole.size(); ++at) {
      for (int bit = 0; bit < 8; ++bit) {
        std::vector<std::byte> changed = whole;
        changed[at] ^= std::byte{1} << bit;
        if (Inflate(changed, 10'000, &out).ok()) CHECK(Text(out) == text);
      }
    }
  }
}

// ---- byte budget
// ------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(a_budget_gives_all_or_nothing_and_forgets_nothing) {
  Budget budget(1000);
  CHECK(budget.Take(600));
  CHECK(!budget.Take(401));
  CHECK(budget.Take(400));
  budget.Force(50);
  CHECK_EQ(budget.free_bytes(), -50);
  CHECK(!budget.Take(1));
  budget.Return(1050);
  CHECK_EQ(budget.free_bytes(), 1000);
  {
    BudgetHold first(budget, 0);
    CHECK(budget.Take(300));
    BudgetHold second(budget, 300);
    first = std::move(second);
    BudgetHold third(std::move(first));
    CHECK_EQ(budget.free_bytes(), 700);
    third = BudgetHold();
    CHECK_EQ(budget.free_bytes(), 1000);
  }
  CHECK_EQ(budget.free_bytes(), 1000);
}

TIDEGATE_TEST(threads_that_share_a_budget_never_overdraw_it) {
  constexpr int64_t kLimit = 10 << 20;
  Budget budget(kLimit);
  std::atomic<int64_t> held{0};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Random random(t);
      LocalBudget local(budget);
      std::vector<int64_t> taken;
      for (int i = 0; i < 4000; ++i) {
        const auto bytes = static_cast<int64_t>(random.Below(random.OneIn(20) ? 3 << 20 : 5000));
        if (random.OneIn(2) && local.Take(bytes)) {
          taken.push_back(bytes);
          CHECK(held.fetch_add(bytes) + bytes <= kLimit);
        } else if (!taken.empty()) {
          held.fetch_sub(taken.back());
          local.Return(taken.back());
          taken.pop_back();
        }
      }
      for (const int64_t bytes : taken) {
        held.fetch_sub(bytes);
        local.Return(bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(budget.free_bytes(), kLimit);
}

TIDEGATE_TEST(a_thread_that_is_alone_can_use_all_of_a_small_budget) {
  Budget budget(100'000);
  LocalBudget local(budget);
  for (int i = 0; i < 3; ++i) {
    CHECK(local.Take(60'000));
    CHECK(!local.Take(60'000));
    CHECK(local.Take(40'000));
    CHECK(local.low());
    local.Force(10'000);
    local.Return(110'000);
    CHECK(!local.low());
    CHECK(local.Take(100'000));
    local.Return(100'000);
  }
}

// ---- locks ----------------------------------------------------------------------------------------------------------

// How a child process ends that does this: 0, or the signal that killed it.
template <typename Action>
int EndOf(Action&& action) {
  const pid_t child = fork();
  if (child == 0) {
    close(STDERR_FILENO);  // what it is about to say is expected
    action();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

TIDEGATE_TEST(locks_taken_in_order_are_fine_and_others_are_reported) {
  RankedMutex<LockRank::kRouteTableWriter> low;
  RankedMutex<LockRank::kBatchQueue> middle;
  RankedMutex<LockRank::kBatchQueue> same;
  RankedMutex<LockRank::kOutbox> high;
  for (int i = 0; i < 2; ++i) {
    RankedLock first(low);
    RankedLock second(middle);
    RankedLock third(high);
    third.Unlock();
    second.Unlock();
    RankedLock again(high);
  }
  // Debug and sanitizer builds end the process at the first mistake; others do not look.
  const int mistake = TIDEGATE_DCHECKS ? SIGABRT : 0;
  CHECK_EQ(EndOf([&] {
             RankedLock first(middle);
             RankedLock second(low);
           }),
           mistake);
  CHECK_EQ(EndOf([&] {
             RankedLock first(middle);
             RankedLock second(same);
           }),
           mistake);
  CHECK_EQ(EndOf([&] {
             RankedLock first(low);
             RankedLock second(high);
             first.Unlock();
           }),
           mistake);
}

// ---- waking
// -----------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(a_publisher_waits_for_the_round_that_may_still_see_what_it_took_away) {
  Quiescence quiescence;
  std::atomic<int*> shared{nullptr};
  std::atomic<bool> stop{false};
  int values[64] = {};
  shared = &values[0];
  std::thread reader([&] {
    while (!stop.load()) {
      quiescence.BeginRound();
      // A race here with the publisher's write is what ThreadSanitizer would report.
      CHECK(*shared.load() >= 0);
      quiescence.EndRound();
    }
  });
  for (int i = 1; i < 500; ++i) {
    int* const before = shared.exchange(&values[i % 64]);
    quiescence.Synchronize();
    *before = i;  // ours alone now
  }
  stop = true;
  reader.join();
  CHECK(quiescence.waiting());
  quiescence.Synchronize();
}

TIDEGATE_TEST(an_outbox_wakes_a_thread_that_sleeps_for_every_mail) {
  // The reader sleeps without a limit, as an idle I/O thread does: a wake that is lost is a hang.
  alarm(60);
  constexpr uint64_t kPosters = 3;
  constexpr uint64_t kEach = 4000;
  Outbox outbox;
  std::vector<std::thread> posters;
  std::vector<std::unique_ptr<Request>> requests(kPosters * kEach / 2);
  for (auto& request : requests) request = std::make_unique<Request>();
  std::atomic<uint64_t> acknowledged{0};
  for (uint64_t p = 0; p < kPosters; ++p) {
    posters.emplace_back([&, p] {
      for (uint64_t i = 0; i < kEach; ++i) {
        if (i % 2 == 0) {
          RequestList one;
          one.PushBack(requests[p * kEach / 2 + i / 2].get());
          outbox.PostDone(&one);
        } else {
          Mail mail;
          mail.command = static_cast<int>(p * kEach + i);
          outbox.PostMail(std::move(mail));
        }
        // Now and then all is quiet, so that the reader falls asleep between two.
        if (i % 16 == 15) {
          while (acknowledged.load() < i / 2) std::this_thread::yield();
        }
      }
    });
  }
  std::vector<Mail> mail;
  std::vector<bool> seen(kPosters * kEach);
  uint64_t n = 0;
  while (n < kPosters * kEach) {
    pollfd waiting{outbox.event_fd(), POLLIN, 0};
    poll(&waiting, 1, outbox.has_mail() ? 0 : -1);
    outbox.quiescence().BeginRound();
    if (waiting.revents & POLLIN) outbox.ClearWake();
    if (outbox.has_mail()) {
      RequestList done;
      outbox.Drain(&done, &mail);
      n += done.size() + mail.size();
      for (const Mail& one : mail) {
        CHECK(!seen[static_cast<size_t>(one.command)]);
        seen[static_cast<size_t>(one.command)] = true;
      }
    }
    outbox.quiescence().EndRound();
    acknowledged.store(n);
  }
  for (std::thread& poster : posters) poster.join();
  // It may say so once too often, of mail that was taken with another's, but nothing is left.
  RequestList none;
  outbox.Drain(&none, &mail);
  CHECK(none.empty() && mail.empty());
  alarm(0);
}

TIDEGATE_TEST(a_wake_is_not_lost_at_the_moment_of_falling_asleep) {
  alarm(60);
  constexpr uint64_t kMails = 30'000;
  Outbox outbox;
  std::atomic<uint64_t> taken{0};
  // Every mail is posted about when the reader announces that it is going to sleep.
  const auto spin = [](Random& random) {
    for (uint64_t left = random.Below(60); left > 0; --left) std::atomic_signal_fence(std::memory_order_seq_cst);
  };
  std::thread poster([&] {
    Random random(1);
    for (uint64_t i = 0; i < kMails; ++i) {
      while (taken.load() < i) {
      }
      spin(random);
      outbox.PostMail({});
    }
  });
  std::vector<Mail> mail;
  Random random(2);
  while (taken.load() < kMails) {
    pollfd waiting{outbox.event_fd(), POLLIN, 0};
    poll(&waiting, 1, outbox.has_mail() ? 0 : -1);
    outbox.quiescence().BeginRound();
    if (waiting.revents & POLLIN) outbox.ClearWake();
    if (outbox.has_mail()) {
      RequestList done;
      outbox.Drain(&done, &mail);
      taken.fetch_add(mail.size());
      spin(random);
    }
    outbox.quiescence().EndRound();
  }
  poster.join();
  alarm(0);
}

TIDEGATE_TEST(a_lane_of_slow_calls_is_bounded_and_tells_the_end) {
  SlowQueue lane;
  for (size_t i = 0; i < SlowQueue::kMostWaiting; ++i) CHECK(lane.Push({}));
  CHECK(!lane.Push({}));
  SlowEvent end;
  end.kind = SlowEvent::Kind::kCancelled;
  CHECK(lane.Push(std::move(end)));  // of a call that is in already
  SlowEvent event;
  for (int i = 0; i < 2; ++i) CHECK(lane.Pop(0, &event));
  CHECK(lane.Push({}));
  CHECK(!lane.Push({}));
  SlowQueue empty;
  CHECK(!empty.Pop(0, &event));
  std::thread closer([&] { empty.Close(); });
  CHECK(!empty.Pop(60, &event));
  closer.join();
  CHECK(!empty.Push({}));
}

}  // namespace
}  // namespace tidegate::test

int main(int argc, char** argv) { return tidegate::test::RunAll(argc, argv); }
