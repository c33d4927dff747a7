// The request path end to end, through real sockets and without a runtime: built to be run under sanitizers, where a
// lifetime mistake or a race ends the program. Every case ends with a front end that is gone and no native object left.
//
//     frontend_test [PART-OF-A-NAME [SCALE [SEED]]]     SCALE multiplies the work; "" is part of every name

#include <atomic>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "test/check.h"
#include "test/h2_client.h"
#include "test/infer_message.h"
#include "test/serving_world.h"
#include "test/traffic.h"

namespace tidegate::test {
namespace {

// ---- one call, step by step -----------------------------------------------------------------------------------------

InferMessage Row(const std::string& model, const std::string& id, size_t columns = 16) {
  InferMessage message;
  message.model = model;
  message.id = id;
  message.shape = {1, static_cast<int64_t>(columns)};
  message.data.assign(columns, id.empty() ? 'z' : id[0]);
  return message;
}

// A client and the call under test on it.
struct Visit {
  std::unique_ptr<H2Client> client;
  ClientStream* stream = nullptr;
};

Visit Begin(World& world, std::string_view path, const Headers& extra = {}, ClientOptions options = {}) {
  Visit visit;
  visit.client = std::make_unique<H2Client>(world.port(), options);
  CHECK(visit.client->connected());
  visit.stream = visit.client->Open(path, extra);
  return visit;
}

Visit Infer(World& world, const InferMessage& message, const Headers& extra = {}, ClientOptions options = {}) {
  Visit visit = Begin(world, kInferPath, extra, options);
  visit.client->Send(visit.stream, Framed(message.Encode()), true);
  visit.client->Pump(0);
  return visit;
}

void CheckEchoed(const ClientStream& stream, const InferMessage& sent) {
  CHECK_EQ(stream.grpc_status(), 0);
  const std::vector<std::string> messages = stream.Messages();
  CHECK_EQ(messages.size(), 1u);
  const InferAnswer answer = DecodeAnswer(messages[0]);
  CHECK_EQ(answer.message.id, sent.id);
  CHECK(answer.message.data == sent.data);
}

// The server is well: a call on a new connection is answered.
void CheckServes(World& world) {
  const InferMessage message = Row("echo", "well");
  Visit visit = Infer(world, message);
  CHECK(visit.client->Finish(visit.stream));
  CheckEchoed(*visit.stream, message);
}

// ---- ways to stop caring
// ----------------------------------------------------------------------------------------------

enum class Leave { kReset, kClose, kAbort };
constexpr Leave kWays[] = {Leave::kReset, Leave::kClose, Leave::kAbort};

// The server has noticed when this returns.
void GoAway(World& world, Visit& visit, Leave how) {
  const uint64_t resets = world.Count("resets_received");
  switch (how) {
    case Leave::kReset:
      visit.client->Reset(visit.stream);
      visit.client->Pump(0);
      EVENTUALLY(world.Count("resets_received") == resets + 1);
      return;
    case Leave::kClose: visit.client->Close(); break;
    case Leave::kAbort: visit.client->Abort(); break;
  }
  // Those of earlier steps that are closed may still be on their way out too.
  EVENTUALLY(world.Count("connections_open") == static_cast<uint64_t>(H2Client::n_connected()));
}

// Models: "echo"; "hold", one request at a time, each waiting for the gate.
struct Stage {
  World world;
  Loaded echo;
  Loaded hold;

  explicit Stage(FrontendSettings settings = TwoIoThreads(),
                 std::map<std::string, SlowMethod, std::less<>> slow_methods = {})
      : world(settings, std::move(slow_methods)) {
    echo = world.Serve("echo", "echo");
    LoadOptions options;
    options.script = "hold";
    options.instances = 1;
    options.dynamic_batching = false;
    hold = world.Serve(Load("hold", "1", options));
  }
  // The case is over: nothing may be alive but what the world itself holds.
  void End() {
    world.AwaitQuiet();
    CheckServes(world);
    echo = {};
    hold = {};
    world.End();
  }
};

// ---- cancelled at every stage ---------------------------------------------------------------------------------------

TIDEGATE_TEST(a_call_can_be_left_while_its_headers_come) {
  Stage stage;
  uint64_t came = 0;
  for (const Leave how : {Leave::kClose, Leave::kAbort}) {
    for (const size_t missing : {1, 9, 20}) {
      H2Client client(stage.world.port());
      client.Open(kInferPath);
      std::string frames = client.TakeOutput();
      frames.resize(frames.size() - missing);
      CHECK(client.SendRaw(frames));
      EVENTUALLY(stage.world.Count("connections_accepted") == came + 1);
      ++came;
      how == Leave::kClose ? client.Close() : client.Abort();
      EVENTUALLY(stage.world.Count("connections_open") == 0);
    }
  }
  stage.End();
}

TIDEGATE_TEST(a_call_can_be_left_before_and_in_its_message) {
  Stage stage;
  const std::string whole = Framed(Row("echo", "left", 5000).Encode());
  for (const Leave how : kWays) {
    for (const size_t come : {size_t{0}, size_t{3}, size_t{5}, whole.size() / 2, whole.size()}) {
      for (const std::string_view path : {kInferPath, kStreamInferPath}) {
        if (path == kStreamInferPath && come == whole.size()) continue;  // that one is answered
        Visit visit = Begin(stage.world, path);
        const uint64_t bytes = stage.world.Count("bytes_received");
        visit.client->Send(visit.stream, whole.substr(0, come), false);
        visit.client->Pump(0);
        EVENTUALLY(stage.world.Count("calls_open") == 1);
        if (come > 5) EVENTUALLY(stage.world.Count("bytes_received") == bytes + come - 5);
        GoAway(stage.world, visit, how);
        stage.world.AwaitQuiet();
      }
    }
  }
  CHECK_EQ(stage.echo.Totals().executions, 0u);
  stage.End();
}

TIDEGATE_TEST(a_call_left_in_the_queue_goes_at_once_and_is_not_run) {
  Stage stage;
  uint32_t left = 0;
  for (const Leave how : kWays) {
    Visit blocker = Infer(stage.world, Row("hold", "blocker"));
    EVENTUALLY(stage.hold.View().running_rows == 1);
    Visit visit = Infer(stage.world, Row("hold", "left"));
    EVENTUALLY(stage.hold.View().waiting == 1);
    GoAway(stage.world, visit, how);
    EVENTUALLY(stage.hold.View().waiting == 0);
    CHECK_EQ(stage.hold.Totals().reasons[static_cast<size_t>(Reason::kCancelled)], ++left);
    stage.hold.gate->Release(1);
    CHECK(blocker.client->Finish(blocker.stream));
    CheckEchoed(*blocker.stream, Row("hold", "blocker"));
    stage.world.AwaitQuiet();
    CHECK_EQ(stage.hold.Totals().rows, left);
  }
  stage.End();
}

TIDEGATE_TEST(a_call_left_while_it_runs_comes_back_to_nobody) {
  Stage stage;
  uint32_t left = 0;
  for (const Leave how : kWays) {
    Visit visit = Infer(stage.world, Row("hold", "left"));
    EVENTUALLY(stage.hold.View().running_rows == 1);
    GoAway(stage.world, visit, how);
    CHECK_EQ(stage.world.Count("requests_live"), 1u);
    stage.hold.gate->Release(1);
    stage.world.AwaitQuiet();
    CHECK_EQ(stage.hold.Totals().reasons[static_cast<size_t>(Reason::kCancelled)], ++left);
  }
  stage.End();
}

TIDEGATE_TEST(a_call_left_with_its_answer_unsent_or_half_sent_is_let_go) {
  Stage stage;
  uint64_t answers = 0;
  for (const Leave how : kWays) {
    for (const uint32_t window : {0u, 10u}) {
      Visit visit = Infer(stage.world, Row("echo", "left"), {}, {.stream_window = window});
      EVENTUALLY(stage.echo.Totals().success == answers + 1);
      ++answers;
      CHECK(visit.client->PumpUntil([&] { return visit.stream->data.size() == window; }));
      CHECK_EQ(stage.world.Count("requests_live"), 1u);
      GoAway(stage.world, visit, how);
      stage.world.AwaitQuiet();
    }
  }
  stage.End();
}

TIDEGATE_TEST(a_stream_left_in_the_middle_gives_up_all_that_it_has_under_way) {
  Stage stage;
  for (const Leave how : kWays) {
    Visit visit = Begin(stage.world, kStreamInferPath);
    for (const char* id : {"answered", "running", "queued", "next"}) {
      visit.client->Send(visit.stream, Framed(Row("hold", id).Encode()), false);
    }
    visit.client->Pump(0);
    stage.hold.gate->Release(1);
    CHECK(visit.client->PumpUntil([&] { return visit.stream->Messages().size() == 1; }));
    CHECK_EQ(DecodeStreamAnswer(visit.stream->Messages()[0]).message.id, "answered");
    EVENTUALLY(stage.hold.View().running_rows == 1 && stage.hold.View().waiting == 2);
    GoAway(stage.world, visit, how);
    EVENTUALLY(stage.hold.View().waiting == 0);
    CHECK_EQ(stage.world.Count("requests_live"), 1u);
    stage.hold.gate->Release(1);
    stage.world.AwaitQuiet();
  }
  CHECK_EQ(stage.hold.Totals().rows, 2 * std::size(kWays));
  stage.End();
}

TIDEGATE_TEST(a_call_that_leaves_the_queue_lets_those_behind_it_go) {
  for (const bool expires : {false, true}) {
    Stage stage;
    LoadOptions options;
    options.script = "hold";
    options.instances = 1;
    options.dynamic_batching = false;
    options.preserve_ordering = true;
    options.priority_levels = 2;
    Loaded ordered = stage.world.Serve(Load("ordered", "1", options));
    Visit blocker = Infer(stage.world, Row("ordered", "blocker"));
    EVENTUALLY(ordered.View().running_rows == 1);
    // It has to wait for those after it, and their answers for its own.
    Visit first = Infer(stage.world, Row("ordered", "first"), expires ? Headers{{"grpc-timeout", "2S"}} : Headers{});
    EVENTUALLY(ordered.View().waiting == 1);
    InferMessage urgent = Row("ordered", "urgent");
    urgent.priority = 1;
    Visit second = Infer(stage.world, urgent);
    EVENTUALLY(ordered.View().waiting == 2);
    Visit third = Infer(stage.world, urgent);
    EVENTUALLY(ordered.View().waiting == 3);
    ordered.gate->Release(2);  // the blocker and the second
    CHECK(blocker.client->Finish(blocker.stream));
    EVENTUALLY(ordered.Totals().executions == 2 && ordered.View().waiting == 1);
    if (expires) {
      CHECK(first.client->Finish(first.stream));
      CHECK_EQ(first.stream->grpc_status(), 4);
    } else {
      CHECK(!second.client->PumpUntil([&] { return second.stream->closed; }, 20));
      GoAway(stage.world, first, Leave::kAbort);
    }
    CHECK(second.client->Finish(second.stream));
    CheckEchoed(*second.stream, urgent);
    ordered.gate->Release(1);
    CHECK(third.client->Finish(third.stream));
    CheckEchoed(*third.stream, urgent);
    CHECK_EQ(ordered.Totals().rows, 3u);
    ordered = {};
    stage.End();
  }
}

// ---- deadlines at every stage ---------------------------------------------------------------------------------------

const Headers kSoon = {{"grpc-timeout", "50m"}};

void CheckTooLate(Visit& visit) {
  CHECK(visit.client->Finish(visit.stream));
  CHECK_EQ(visit.stream->grpc_status(), 4);
}

TIDEGATE_TEST(a_deadline_ends_a_call_whose_message_does_not_come) {
  Stage stage;
  const std::string whole = Framed(Row("echo", "late", 500).Encode());
  for (const std::string_view path : {kInferPath, kStreamInferPath}) {
    for (const size_t come : {size_t{0}, size_t{3}, whole.size() / 2}) {
      Visit visit = Begin(stage.world, path, kSoon);
      visit.client->Send(visit.stream, whole.substr(0, come), false);
      CheckTooLate(visit);
      // More of it after the answer disturbs nobody.
      stage.world.AwaitQuiet();
    }
  }
  Visit none = Begin(stage.world, kInferPath, {{"grpc-timeout", "0S"}});
  CheckTooLate(none);
  stage.End();
}

TIDEGATE_TEST(a_deadline_takes_a_waiting_call_out_of_the_queue) {
  Stage stage;
  Visit blocker = Infer(stage.world, Row("hold", "blocker"));
  EVENTUALLY(stage.hold.View().running_rows == 1);
  std::vector<Visit> late;
  for (int i = 0; i < 8; ++i) late.push_back(Infer(stage.world, Row("hold", "late"), kSoon));
  for (Visit& visit : late) CheckTooLate(visit);
  EVENTUALLY(stage.hold.View().waiting == 0);
  stage.hold.gate->Release(1);
  CHECK(blocker.client->Finish(blocker.stream));
  CheckEchoed(*blocker.stream, Row("hold", "blocker"));
  stage.world.AwaitQuiet();
  CHECK_EQ(stage.hold.Totals().rows, 1u);
  CHECK_EQ(stage.hold.Totals().reasons[static_cast<size_t>(Reason::kDeadlinePassed)], late.size());
  stage.End();
}

TIDEGATE_TEST(a_deadline_is_answered_while_the_call_still_runs) {
  Stage stage;
  Visit visit = Infer(stage.world, Row("hold", "late"), kSoon);
  EVENTUALLY(stage.hold.View().running_rows == 1 || visit.stream->closed);
  CheckTooLate(visit);
  stage.hold.gate->Release(1);
  stage.world.AwaitQuiet();
  stage.End();
}

TIDEGATE_TEST(an_answer_that_was_ready_in_time_is_not_taken_back) {
  Stage stage;
  Visit visit = Infer(stage.world, Row("echo", "ready"), {{"grpc-timeout", "100m"}}, {.stream_window = 0});
  EVENTUALLY(stage.echo.Totals().success + stage.echo.Totals().fail == 1);
  const bool in_time = stage.echo.Totals().success == 1;
  // Well past the deadline the window opens.
  const int64_t until_ns = NowNs() + 150'000'000;
  visit.client->PumpUntil([&] { return NowNs() >= until_ns; });
  if (!visit.stream->closed) visit.client->Grant(visit.stream, 1 << 20);
  CHECK(visit.client->Finish(visit.stream));
  if (in_time) {
    CheckEchoed(*visit.stream, Row("echo", "ready"));
  } else {
    CHECK_EQ(visit.stream->grpc_status(), 4);
  }
  stage.End();
}

TIDEGATE_TEST(a_deadline_ends_a_stream_after_the_answers_that_were_ready) {
  Stage stage;
  stage.hold.gate->Release(1);
  Visit visit = Begin(stage.world, kStreamInferPath, {{"grpc-timeout", "400m"}});
  for (const char* id : {"first", "second", "third"}) {
    visit.client->Send(visit.stream, Framed(Row("hold", id).Encode()), false);
  }
  CheckTooLate(visit);
  CHECK_EQ(visit.stream->Messages().size(), 1u);
  EVENTUALLY(stage.hold.View().waiting == 0);
  stage.hold.gate->Release(1);
  stage.world.AwaitQuiet();
  CHECK_EQ(stage.hold.Totals().rows, 2u);
  stage.End();
}

// ---- streams --------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(an_answer_that_waits_for_its_turn_outlives_its_version) {
  for (const bool fails : {false, true}) {
    Stage stage;
    stage.world.Serve("other", fails ? "fail-on:111" : "echo");  // 'o'
    Visit visit = Begin(stage.world, kStreamInferPath);
    visit.client->Send(visit.stream, Framed(Row("hold", "first").Encode()), false);
    visit.client->Send(visit.stream, Framed(Row("other", "other").Encode()), true);
    visit.client->Pump(0);
    EVENTUALLY(stage.hold.View().running_rows == 1);
    std::vector<Loaded> gone = stage.world.Withdraw("other");
    EVENTUALLY(gone[0].Totals().success + gone[0].Totals().fail == 1);
    CHECK(gone[0].version->Retire(10'000'000'000));
    gone.clear();  // freed here; its answer is still behind the first one
    CHECK(visit.stream->Messages().empty());
    stage.hold.gate->Release(1);
    CHECK(visit.client->Finish(visit.stream));
    CHECK_EQ(visit.stream->grpc_status(), 0);
    const std::vector<std::string> messages = visit.stream->Messages();
    CHECK_EQ(messages.size(), 2u);
    CHECK_EQ(DecodeStreamAnswer(messages[0]).message.id, "first");
    const InferAnswer second = DecodeStreamAnswer(messages[1]);
    CHECK_EQ(second.message.id, "other");
    CHECK_EQ(second.message.model, "other");
    CHECK_EQ(second.error_message.empty(), !fails);
    stage.End();
  }
}

TIDEGATE_TEST(a_stream_with_triton_grpc_error_ends_at_the_first_failure) {
  Stage stage;
  stage.world.Serve("picky", "fail-on:98");  // 'b'
  Visit visit = Begin(stage.world, kStreamInferPath, {{"triton_grpc_error", "true"}});
  for (const char* id : {"good", "bad", "late"}) {
    visit.client->Send(visit.stream, Framed(Row("picky", id).Encode()), false);
  }
  visit.client->Send(visit.stream, Framed(Row("hold", "hold").Encode()), false);
  CHECK(visit.client->Finish(visit.stream));
  CHECK_EQ(visit.stream->grpc_status(), 13);
  CHECK_EQ(visit.stream->Messages().size(), 1u);
  stage.hold.gate->Release(1);
  stage.End();
}

TIDEGATE_TEST(an_empty_message_is_a_message) {
  Stage stage;
  // Behind it, in the same piece, comes another: a unary call has one.
  Visit unary = Begin(stage.world, kInferPath);
  unary.client->Send(unary.stream, Framed("") + Framed(Row("echo", "second").Encode()), true);
  CHECK(unary.client->Finish(unary.stream));
  CHECK_EQ(unary.stream->grpc_status(), 13);
  // A stream answers both: an empty request names no model.
  Visit stream = Begin(stage.world, kStreamInferPath);
  stream.client->Send(stream.stream, Framed("") + Framed(Row("echo", "second").Encode()), true);
  CHECK(stream.client->Finish(stream.stream));
  const std::vector<std::string> messages = stream.stream->Messages();
  CHECK_EQ(messages.size(), 2u);
  CHECK(!DecodeStreamAnswer(messages[0]).error_message.empty());
  CHECK_EQ(DecodeStreamAnswer(messages[1]).message.id, "second");
  stage.End();
}

// ---- failures -------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(one_bad_row_of_a_batch_fails_alone) {
  constexpr int kRows = 32;
  for (int bad = 0; bad < kRows; bad += 7) {
    World world;
    LoadOptions options;
    options.script = "fail-on:" + std::to_string(kBadByte);
    options.instances = 1;
    Loaded picky = world.Serve(Load("picky", "1", options));
    H2Client client(world.port());
    std::vector<ClientStream*> streams;
    for (int i = 0; i < kRows; ++i) {
      InferMessage message = Row("picky", std::to_string(i));
      if (i == bad) message.data[0] = static_cast<char>(kBadByte);
      streams.push_back(client.Open(kInferPath));
      client.Send(streams.back(), Framed(message.Encode()), true);
    }
    // In one write, so that they come in one round and share a batch.
    CHECK(client.SendRaw(client.TakeOutput()));
    for (int i = 0; i < kRows; ++i) {
      ClientStream* stream = streams[static_cast<size_t>(i)];
      CHECK(client.Finish(stream));
      if (i == bad) {
        CHECK_EQ(stream->grpc_status(), 13);
        CHECK(stream->Messages().empty());
      } else {
        CheckEchoed(*stream, Row("picky", std::to_string(i)));
      }
    }
    CHECK(picky.Totals().bisections > 0);
    CHECK_EQ(picky.Totals().success, uint64_t{kRows - 1});
    picky = {};
  }
}

TIDEGATE_TEST(a_full_queue_refuses_and_says_when_to_come_again) {
  Stage stage;
  LoadOptions options;
  options.script = "hold";
  options.instances = 1;
  options.max_queue_size = 2;
  options.dynamic_batching = false;
  Loaded small = stage.world.Serve(Load("small", "1", options));
  Visit running = Infer(stage.world, Row("small", "running"));
  EVENTUALLY(small.View().running_rows == 1);
  H2Client client(stage.world.port());
  std::vector<ClientStream*> streams;
  for (int i = 0; i < 5; ++i) {
    streams.push_back(client.Open(kInferPath));
    client.Send(streams.back(), Framed(Row("small", std::to_string(i)).Encode()), true);
  }
  CHECK(client.PumpUntil([&] { return client.n_open() == 2; }));
  small.gate->Release(3);
  int refused = 0;
  for (ClientStream* stream : streams) {
    CHECK(client.Finish(stream));
    if (stream->grpc_status() == 0) continue;
    CHECK_EQ(stream->grpc_status(), 8);
    CHECK(!stream->Header("grpc-retry-pushback-ms").empty());
    ++refused;
  }
  CHECK_EQ(refused, 3);
  CHECK(running.client->Finish(running.stream));
  small = {};
  stage.End();
}

TIDEGATE_TEST(the_byte_budget_refuses_what_does_not_fit_and_loses_nothing) {
  constexpr size_t kBudget = 1 << 20;
  FrontendSettings settings = TwoIoThreads();
  settings.io_threads = 1;  // so that what its thread keeps at hand is all of the budget
  settings.max_message_bytes = kBudget;
  settings.max_inflight_bytes = kBudget;
  World world(settings);
  world.Serve("slow", "sleep:2000", 1);
  Traffic traffic;
  traffic.models = {"slow"};
  traffic.calls = 150 * scale;
  traffic.streams = 4;
  traffic.columns = {100, 60'000, 120'000};
  traffic.most_rows = 2;
  traffic.cancel_one_in = 16;
  traffic.may_be_refused = true;
  const Tally tally = RunThreads(world.port(), traffic, 2);
  CHECK(tally.answered > 0);
  CHECK(tally.refused > 0);
  world.AwaitQuiet();
  // Every byte is back: a message of nearly the whole budget is taken, now as before.
  InferMessage large = Row("slow", "large", kBudget / 2 - 100);
  Visit visit = Infer(world, large);
  CHECK(visit.client->Finish(visit.stream));
  CheckEchoed(*visit.stream, large);
  Visit too_large = Infer(world, Row("slow", "too large", kBudget));
  CHECK(too_large.client->Finish(too_large.stream));
  CHECK_EQ(too_large.stream->grpc_status(), 8);
}

// ---- under load -----------------------------------------------------------------------------------------------------

TIDEGATE_TEST(every_request_is_answered_once_with_its_own_bytes) {
  World world;
  world.Serve("echo", "echo");
  world.Serve("ordered", "echo");
  world.Serve("sleepy", "sleep:200");
  LoadOptions ordered;
  ordered.preserve_ordering = true;
  world.Serve(Load("ordered", "2", ordered));
  Traffic traffic;
  traffic.models = {"echo", "ordered", "sleepy"};
  traffic.calls = 700 * scale;
  const Tally tally = RunThreads(world.port(), traffic, 3);
  CHECK_EQ(tally.answered, 3 * traffic.calls);
  CHECK_EQ(world.Count("calls"), tally.calls);
  world.AwaitQuiet();
}

TIDEGATE_TEST(calls_cancelled_at_random_moments_harm_no_other) {
  World world;
  world.Serve("echo", "echo");
  world.Serve("sleepy", "sleep:500");
  world.Serve("picky", "fail-on:" + std::to_string(kBadByte));
  LoadOptions ordered;
  ordered.preserve_ordering = true;
  ordered.script = "sleep:300";
  world.Serve(Load("ordered", "1", ordered));
  Traffic traffic;
  traffic.models = {"echo", "sleepy", "ordered"};
  traffic.calls = 700 * scale;
  traffic.cancel_one_in = 3;
  traffic.abort_one_in = 2;
  const Tally tally = RunThreads(world.port(), traffic, 3);
  CHECK(tally.cancelled > 0);
  CHECK(tally.answered > 0);
  world.AwaitQuiet();
}

TIDEGATE_TEST(deadlines_failures_and_cancels_together) {
  World world;
  world.Serve("picky", "fail-on:" + std::to_string(kBadByte));
  LoadOptions options;
  options.script = "fail-on:" + std::to_string(kBadByte);
  options.preserve_ordering = true;
  world.Serve(Load("ordered", "1", options));
  Traffic traffic;
  traffic.models = {"picky", "ordered"};
  traffic.calls = 700 * scale;
  traffic.bad_one_in = 4;
  traffic.cancel_one_in = 8;
  traffic.abort_one_in = 4;
  traffic.deadline_one_in = 4;
  const Tally tally = RunThreads(world.port(), traffic, 3);
  CHECK(tally.failed > 0);
  CHECK(tally.late > 0);
  CHECK(tally.answered > 0);
  world.AwaitQuiet();
}

// Reads what a scrape reads, without a pause.
class Scraper {
 public:
  Scraper(const World& world, std::vector<Loaded> versions)
      : thread_([this, &world, versions = std::move(versions)] {
          uint64_t seen = 0;
          while (!stop_.load(std::memory_order_relaxed)) {
            CHECK_EQ(world.Count("connections_refused"), 0u);
            uint64_t answered = 0;
            for (const Loaded& loaded : versions) {
              answered += loaded.Totals().success;
              loaded.View();
            }
            CHECK(answered >= seen);  // counters only grow
            seen = answered;
          }
        }) {}
  ~Scraper() {
    stop_.store(true, std::memory_order_relaxed);
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

TIDEGATE_TEST(versions_are_swapped_under_load_and_nothing_is_lost) {
  const uint32_t swaps = 30 * scale;
  World world;
  world.Serve(Load("echo", "1", {}));
  const Loaded& sleepy = world.Serve("sleepy", "sleep:300");
  std::atomic<bool> stop{false};
  Traffic traffic;
  traffic.models = {"echo", "sleepy"};
  traffic.calls = UINT64_MAX;
  traffic.cancel_one_in = 16;
  Tally tally;
  std::thread load([&] { tally = RunThreads(world.port(), traffic, 2, &stop); });
  {
    Scraper scraper(world, {sleepy});
    for (uint32_t i = 2; i < swaps + 2; ++i) {
      LoadOptions options;
      options.preserve_ordering = i % 2 == 0;
      options.script = i % 3 == 0 ? "sleep:100" : "echo";
      const Loaded fresh = Load("echo", std::to_string(i), options);
      // It serves before the next one comes.
      const std::vector<Loaded> before = world.Replace(fresh);
      for (const Loaded& old : before) CHECK(old.version->Retire(10'000'000'000));
      EVENTUALLY(fresh.Totals().success > 0);
    }
  }
  stop.store(true);
  load.join();
  CHECK_EQ(tally.answered + tally.cancelled, tally.calls);
  CHECK(tally.answered > swaps);
  world.AwaitQuiet();
}

TIDEGATE_TEST(a_version_that_must_go_now_ends_its_runs_with_an_error) {
  Stage stage;
  Visit running = Infer(stage.world, Row("hold", "running"));
  EVENTUALLY(stage.hold.View().running_rows == 1);
  Visit waiting = Infer(stage.world, Row("hold", "waiting"));
  EVENTUALLY(stage.hold.View().waiting == 1);
  stage.world.Withdraw("hold");
  CHECK(!stage.hold.version->Retire(1'000'000));
  for (Visit* visit : {&running, &waiting}) {
    CHECK(visit->client->Finish(visit->stream));
    CHECK_EQ(visit->stream->grpc_status(), 13);
  }
  Visit late = Infer(stage.world, Row("hold", "late"));
  CHECK(late.client->Finish(late.stream));
  CHECK_EQ(late.stream->grpc_status(), 5);
  stage.End();
}

TIDEGATE_TEST(a_drain_under_load_answers_everything_it_took) {
  for (int round = 0; round < 3; ++round) {
    World world;
    const Loaded& echo = world.Serve("echo", "echo");
    world.Serve("sleepy", "sleep:500");
    Traffic traffic;
    traffic.models = {"echo", "sleepy"};
    traffic.calls = UINT64_MAX;
    traffic.cancel_one_in = round == 2 ? 8 : 0;
    traffic.may_go = true;
    std::atomic<bool> stop{false};
    Tally tally;
    std::thread load([&] { tally = RunThreads(world.port(), traffic, 2, &stop); });
    EVENTUALLY(echo.Totals().success > 100);
    const int64_t began_ns = NowNs();
    CHECK(world.frontend().Drain(20'000'000'000));
    const int64_t took_ns = NowNs() - began_ns;
    // Clients that are told to go elsewhere find no server there.
    stop.store(true);
    load.join();
    CHECK(tally.answered >= 100);
    // Told in time, they had opened nothing that the server would not take. (Who takes a second to hear is not waited
    // for.)
    if (took_ns < 900'000'000) CHECK_EQ(tally.turned_away, 0u);
    CHECK_EQ(world.Count("connections_open"), 0u);
  }
}

TIDEGATE_TEST(connections_that_grow_old_are_replaced_and_no_call_fails) {
  FrontendSettings settings = TwoIoThreads();
  settings.max_connection_age_ns = 1;  // at the next look, once a second
  settings.max_connection_age_grace_ns = 20'000'000'000;
  World world(settings);
  const Loaded& echo = world.Serve("echo", "echo");
  Traffic traffic;
  traffic.models = {"echo"};
  traffic.calls = UINT64_MAX;
  std::atomic<bool> stop{false};
  Tally tally;
  std::thread load([&] { tally = RunThreads(world.port(), traffic, 2, &stop); });
  // Two generations of the four connections have gone.
  EVENTUALLY(world.Count("connections_accepted") >= 12);
  CHECK(echo.Totals().success > 0);
  stop.store(true);
  load.join();
  CHECK_EQ(tally.answered + tally.unsent + tally.turned_away, tally.calls);
  world.AwaitQuiet();
}

TIDEGATE_TEST(a_stop_with_work_in_flight_waits_for_the_runs_and_leaves_nothing) {
  Stage stage;
  std::vector<Visit> visits;
  for (int i = 0; i < 8; ++i) visits.push_back(Infer(stage.world, Row("hold", std::to_string(i))));
  EVENTUALLY(stage.hold.View().running_rows == 1 && stage.hold.View().waiting == 7);
  Visit half = Begin(stage.world, kInferPath);
  half.client->Send(half.stream, "abc", false);
  half.client->Pump(0);
  Visit stuck = Infer(stage.world, Row("echo", "stuck"), {}, {.stream_window = 0});
  EVENTUALLY(stage.echo.Totals().success == 1);
  std::thread stop([&] { stage.world.frontend().Stop(); });
  for (Visit& visit : visits) {
    CHECK(!visit.client->PumpUntil([&] { return visit.stream->grpc_status() >= 0; }));
    CHECK(visit.stream->lost);
  }
  EVENTUALLY(stage.hold.View().waiting == 0);
  CHECK_EQ(stage.world.Count("requests_live"), 1u);  // the run that must end first
  stage.hold.gate->Release(1);
  stop.join();
  CHECK_EQ(stage.hold.Totals().reasons[static_cast<size_t>(Reason::kCancelled)], 8u);
  stage.echo = stage.hold = {};
  stage.world.End();
}

TIDEGATE_TEST(a_stop_under_load_leaves_nothing) {
  for (int round = 0; round < 3; ++round) {
    World world;
    const Loaded& echo = world.Serve("echo", "echo");
    world.Serve("sleepy", "sleep:1000");
    Traffic traffic;
    traffic.models = {"echo", "sleepy"};
    traffic.calls = UINT64_MAX;
    traffic.cancel_one_in = 8;
    traffic.may_be_lost = true;
    std::atomic<bool> stop{false};
    Tally tally;
    std::thread load([&] { tally = RunThreads(world.port(), traffic, 2, &stop); });
    EVENTUALLY(echo.Totals().success > 100);
    world.frontend().Stop();
    stop.store(true);
    load.join();
    CHECK(tally.answered > 0);
  }
}

TIDEGATE_TEST(a_front_end_that_has_stopped_publishes_nothing) {
  World world;
  world.Serve("echo", "echo");
  world.frontend().Stop();
  world.Serve("late", "echo");
  // World::End proves that the front end and the version do not keep each other alive.
}

// ---- slow calls -----------------------------------------------------------------------------------------------------

constexpr std::string_view kSlowUnary = "/test.Slow/Unary";
constexpr std::string_view kSlowStream = "/test.Slow/Stream";

std::map<std::string, SlowMethod, std::less<>> SlowMethods() {
  return {{std::string(kSlowUnary), {kFastLane, false}}, {std::string(kSlowStream), {kGeneralLane, true}}};
}

// The Python of these tests: takes the events of both lanes, keeps calls for a while and answers with what came.
class Handlers {
 public:
  explicit Handlers(const std::shared_ptr<FrontendCore>& frontend) : frontend_(frontend) {
    for (const uint8_t lane : {kFastLane, kGeneralLane}) threads_.emplace_back([this, lane] { Serve(lane); });
  }
  // Answers what is still kept.
  void Join() {
    stop_.store(true);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  ~Handlers() { Join(); }
  uint64_t cancelled() const { return cancelled_.load(); }

 private:
  static std::string Text(const SlowEvent& event) {
    return {reinterpret_cast<const char*>(event.payload.data()), event.payload.size()};
  }

  static void Answer(const SlowEvent& event) {
    const std::string text = Text(event);
    if (event.kind == SlowEvent::Kind::kMessage) event.call->Send(text.data(), text.size());
    if (event.kind == SlowEvent::Kind::kHalfClose || event.call->method() == kSlowUnary) {
      event.call->Finish(0, "", {{"x-answered", "yes"}});
    }
  }

  void Serve(uint8_t lane) {
    Random random(seed + lane);
    std::deque<SlowEvent> kept;
    while (!stop_.load()) {
      SlowEvent event;
      if (frontend_->lane(lane).Pop(0.002, &event)) {
        if (event.kind == SlowEvent::Kind::kCancelled) {
          CHECK(event.call->cancelled());
          ++cancelled_;
        } else {
          kept.push_back(std::move(event));
        }
      }
      // In order, so that the messages of a stream stay in theirs.
      while (!kept.empty() && (kept.size() > 20 || random.OneIn(3))) {
        Answer(kept.front());
        kept.pop_front();
      }
    }
    for (const SlowEvent& event : kept) Answer(event);
  }

  const std::shared_ptr<FrontendCore> frontend_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> cancelled_{0};
  std::vector<std::thread> threads_;
};

TIDEGATE_TEST(slow_calls_are_answered_from_other_threads_while_their_streams_go_away) {
  World world(TwoIoThreads(), SlowMethods());
  world.Serve("echo", "echo");
  Handlers handlers(world.shared_frontend());
  const auto client_thread = [&](uint32_t thread) {
    Random random(seed + 77 + thread);
    for (uint32_t round = 0; round < 12 * scale; ++round) {
      H2Client client(world.port());
      struct One {
        ClientStream* stream;
        std::string sent;
        size_t messages;
        bool cancelled;
      };
      std::vector<One> calls;
      for (int i = 0; i < 12; ++i) {
        const bool stream = random.OneIn(2);
        One one{client.Open(stream ? kSlowStream : kSlowUnary), "", stream ? 1 + random.Below(4) : 1, random.OneIn(3)};
        for (size_t m = 0; m < one.messages; ++m) {
          const std::string text(random.Below(300), static_cast<char>('a' + m));
          one.sent += Framed(text);
          client.Send(one.stream, Framed(text), m + 1 == one.messages);
        }
        calls.push_back(std::move(one));
      }
      const uint64_t turns = random.Below(6);
      for (uint64_t turn = 0; turn < turns; ++turn) client.Pump(1);
      if (random.OneIn(4)) {
        random.OneIn(2) ? client.Abort() : client.Close();
        continue;
      }
      for (One& one : calls) {
        if (one.cancelled) client.Reset(one.stream);
      }
      for (One& one : calls) {
        CHECK(client.Finish(one.stream));
        if (one.cancelled && one.stream->grpc_status() < 0) continue;
        CHECK_EQ(one.stream->grpc_status(), 0);
        CHECK_EQ(one.stream->Header("x-answered"), "yes");
        CHECK(one.stream->data == one.sent);
      }
    }
  };
  std::vector<std::thread> clients;
  for (uint32_t i = 0; i < 3; ++i) clients.emplace_back(client_thread, i);
  for (std::thread& thread : clients) thread.join();
  CHECK(handlers.cancelled() > 0);
  world.AwaitQuiet();
  CheckServes(world);
  handlers.Join();
}

TIDEGATE_TEST(a_late_answer_does_not_reach_the_next_client_of_its_slot) {
  FrontendSettings settings = TwoIoThreads();
  settings.io_threads = 1;
  World world(settings, SlowMethods());
  for (uint32_t generation = 1; generation <= 3; ++generation) {
    Visit visit = Begin(world, kSlowUnary);
    visit.client->Send(visit.stream, Framed("question"), true);
    visit.client->Pump(0);
    SlowEvent event;
    CHECK(world.frontend().lane(kFastLane).Pop(20, &event));
    // What is under way to streams that had this slot and this id before.
    const std::shared_ptr<Outbox>& outbox = world.frontend().io_threads()[0]->outbox();
    for (uint32_t before = 0; before <= generation + 1; ++before) {
      if (before == generation) continue;
      SlowCall late(outbox, StreamRef{0, before, visit.stream->id}, "", "", {});
      late.Send("late", 4);
      late.Finish(5, "late", {});
    }
    SlowCall nowhere(outbox, StreamRef{1000, 1, visit.stream->id}, "", "", {});
    nowhere.Finish(5, "late", {});
    event.call->Send("answer", 6);
    event.call->Finish(0, "", {});
    CHECK(visit.client->Finish(visit.stream));
    CHECK_EQ(visit.stream->grpc_status(), 0);
    CHECK(visit.stream->data == Framed("answer"));
    visit.client->Close();
    EVENTUALLY(world.Count("connections_open") == 0);
  }
}

TIDEGATE_TEST(slow_calls_outlive_the_front_end_that_took_them) {
  std::vector<SlowEvent> kept;
  {
    World world(TwoIoThreads(), SlowMethods());
    Visit unary = Begin(world, kSlowUnary);
    unary.client->Send(unary.stream, Framed("one"), true);
    Visit stream = Begin(world, kSlowStream);
    stream.client->Send(stream.stream, Framed("two"), false);
    for (Visit* visit : {&unary, &stream}) visit->client->Pump(0);
    for (const uint8_t lane : {kFastLane, kGeneralLane}) {
      SlowEvent event;
      CHECK(world.frontend().lane(lane).Pop(20, &event));
      kept.push_back(std::move(event));
    }
    // Two that nobody takes before the stop.
    Visit untaken = Begin(world, kSlowUnary);
    untaken.client->Send(untaken.stream, Framed("three"), true);
    untaken.client->Pump(0);
    EVENTUALLY(world.Count("calls_open") == 3);
    world.frontend().Stop();
    for (const SlowEvent& event : kept) CHECK(event.call->cancelled());
    SlowEvent none;
    world.frontend().lane(kFastLane).Pop(0, &none);
    // Python takes what it wants out of the event at once; the call is what it holds on to.
    for (SlowEvent& event : kept) event.held = BudgetHold();
  }
  for (const SlowEvent& event : kept) {
    event.call->Send("late", 4);
    event.call->Finish(0, "late", {});
  }
}

TIDEGATE_TEST(slow_calls_are_told_when_their_deadline_has_passed) {
  World world(TwoIoThreads(), SlowMethods());
  for (const std::string_view path : {kSlowUnary, kSlowStream}) {
    const uint8_t lane = path == kSlowUnary ? kFastLane : kGeneralLane;
    Visit visit = Begin(world, path, kSoon);
    visit.client->Send(visit.stream, Framed("x"), path == kSlowUnary);
    visit.client->Pump(0);
    SlowEvent event;
    CHECK(world.frontend().lane(lane).Pop(20, &event));
    if (event.kind == SlowEvent::Kind::kCancelled) continue;  // a machine so slow that it was over before
    CheckTooLate(visit);
    EVENTUALLY(event.call->cancelled());
    if (path == kSlowStream) {
      SlowEvent end;
      CHECK(world.frontend().lane(lane).Pop(20, &end));
      CHECK(end.kind == SlowEvent::Kind::kCancelled);
      CHECK(end.call == event.call);
    }
    event.call->Send("late", 4);
    event.call->Finish(0, "", {});
    world.AwaitQuiet();
  }
}

// ---- bytes that are no request --------------------------------------------------------------------------------------

// What a client sends for one call, from the preface on.
std::string Conversation(World& world) {
  H2Client client(world.port());
  ClientStream* unary = client.Open(kInferPath);
  client.Send(unary, Framed(Row("echo", "cut", 300).Encode()), true);
  ClientStream* stream = client.Open(kStreamInferPath);
  client.Send(stream, Framed(Row("echo", "one").Encode()) + Framed(Row("echo", "two").Encode()), true);
  return client.TakeOutput();
}

// Sends the bytes and leaves, having read whatever came until then.
void Throw(World& world, std::string_view bytes, Random& random) {
  H2Client client(world.port());
  CHECK(client.connected());
  if (!client.SendRaw(bytes)) return;
  if (random.OneIn(2)) client.Pump(1);
  random.OneIn(2) ? client.Abort() : client.Close();
}

TIDEGATE_TEST(a_connection_may_be_cut_at_every_byte) {
  World world;
  world.Serve("echo", "echo");
  const std::string whole = Conversation(world);
  Random random(seed);
  for (size_t cut = 0; cut <= whole.size(); ++cut) Throw(world, std::string_view(whole).substr(0, cut), random);
  EVENTUALLY(world.Count("connections_open") == 0);
  world.AwaitQuiet();
  CheckServes(world);
}

TIDEGATE_TEST(changed_bytes_harm_nobody_else) {
  World world;
  world.Serve("echo", "echo");
  const std::string whole = Conversation(world);
  Random random(seed);
  for (uint32_t i = 0; i < 600 * scale; ++i) {
    std::string changed = whole;
    for (uint64_t n = 1 + random.Below(4); n > 0; --n) {
      const size_t at = 24 + random.Below(changed.size() - 24);  // after the preface
      switch (random.Below(3)) {
        case 0: changed[at] = static_cast<char>(random.Next()); break;
        case 1: changed.erase(at, 1 + random.Below(8)); break;
        case 2: changed.insert(at, 1 + random.Below(8), static_cast<char>(random.Next())); break;
      }
    }
    Throw(world, changed, random);
  }
  EVENTUALLY(world.Count("connections_open") == 0);
  world.AwaitQuiet();
  CheckServes(world);
}

}  // namespace
}  // namespace tidegate::test

int main(int argc, char** argv) {
  if (argc > 2) tidegate::test::scale = static_cast<uint32_t>(std::max(std::atoi(argv[2]), 1));
  if (argc > 3) tidegate::test::seed = std::strtoull(argv[3], nullptr, 10);
  return tidegate::test::RunAll(argc, argv);
}
