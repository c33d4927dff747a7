#include "test/traffic.h"

#include <zlib.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "test/check.h"
#include "test/h2_client.h"
#include "test/infer_message.h"
#include "test/serving_world.h"

namespace tidegate::test {
namespace {

// zlib's format, which gRPC calls deflate.
std::string Deflated(std::string_view bytes) {
  uLongf size = compressBound(bytes.size());
  std::string out(size, '\0');
  CHECK(compress(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(bytes.data()),
                 bytes.size()) == Z_OK);
  out.resize(size);
  return out;
}

struct OpenCall {
  ClientStream* stream = nullptr;
  bool in_stream = false;
  bool bad = false;
  bool timed = false;
  bool cancelled = false;
  std::vector<InferMessage> messages;
  std::string unsent;                  // of the body
  uint64_t cancel_after = UINT64_MAX;  // turns of the loop
};

struct Line {
  std::vector<OpenCall> calls;
  uint64_t abort_after = UINT64_MAX;
};

class Client {
 public:
  Client(uint16_t port, const Traffic& traffic, uint32_t thread)
      : port_(port), traffic_(traffic), random_(seed + 1'000'003u * thread), thread_(thread) {}

  Tally Run(const std::atomic<bool>* stop) {
    while (true) {
      const bool over =
          server_gone_ || tally_.calls >= traffic_.calls || (stop && stop->load(std::memory_order_relaxed));
      if (!over) Fill();
      size_t open = 0;
      for (size_t i = 0; i < clients_.size(); ++i) {
        Turn(i);
        open += lines_[i].calls.size();
      }
      if (over && open == 0) return tally_;
      H2Client::PumpAll(clients_, 2);
      for (size_t i = 0; i < clients_.size(); ++i) Reap(i);
      Sweep();
    }
  }

 private:
  void Fill() {
    size_t usable = 0;
    for (const auto& client : clients_) usable += !client->gone() && !client->goaway();
    while (usable < traffic_.connections) {
      auto client = std::make_unique<H2Client>(port_);
      if (!client->connected()) {
        CHECK(traffic_.may_go || traffic_.may_be_lost);
        server_gone_ = true;
        return;
      }
      clients_.push_back(std::move(client));
      lines_.emplace_back();
      if (random_.OneIn(traffic_.abort_one_in)) lines_.back().abort_after = random_.Below(60);
      ++usable;
    }
    for (size_t i = 0; i < clients_.size(); ++i) {
      if (clients_[i]->gone() || clients_[i]->goaway()) continue;
      while (lines_[i].calls.size() < traffic_.streams && tally_.calls < traffic_.calls) OpenOne(i);
    }
  }

  InferMessage Message(bool bad) {
    InferMessage message;
    message.model = traffic_.models[random_.Below(traffic_.models.size())];
    message.id = std::to_string(thread_) + "." + std::to_string(next_id_++);
    const auto rows = static_cast<int64_t>(1 + random_.Below(traffic_.most_rows));
    const int64_t columns = traffic_.columns[random_.Below(traffic_.columns.size())];
    message.shape = {rows, columns};
    message.data.resize(static_cast<size_t>(rows * columns));
    for (char& byte : message.data) byte = static_cast<char>(random_.Next());
    if (static_cast<uint8_t>(message.data[0]) == kBadByte) message.data[0] = 0;
    if (bad) message.data[0] = static_cast<char>(kBadByte);
    return message;
  }

  void OpenOne(size_t line) {
    OpenCall call;
    call.in_stream = random_.OneIn(traffic_.stream_one_in);
    call.bad = random_.OneIn(traffic_.bad_one_in);
    call.timed = random_.OneIn(traffic_.deadline_one_in);
    const bool deflate = random_.OneIn(traffic_.deflate_one_in);
    Headers extra;
    if (call.timed) extra.emplace_back("grpc-timeout", std::to_string(random_.Below(20'000)) + "u");
    if (deflate) extra.emplace_back("grpc-encoding", "deflate");
    std::string body;
    const uint64_t n = call.in_stream ? 1 + random_.Below(5) : 1;
    for (uint64_t i = 0; i < n; ++i) {
      call.messages.push_back(Message(call.bad));
      const std::string bytes = call.messages.back().Encode();
      body += deflate ? Framed(Deflated(bytes), true) : Framed(bytes);
    }
    call.stream = clients_[line]->Open(call.in_stream ? kStreamInferPath : kInferPath, extra);
    if (random_.OneIn(traffic_.pieces_one_in)) {
      call.unsent = std::move(body);
    } else {
      clients_[line]->Send(call.stream, body, true);
    }
    if (random_.OneIn(traffic_.cancel_one_in)) call.cancel_after = random_.Below(12);
    ++tally_.calls;
    lines_[line].calls.push_back(std::move(call));
  }

  // What a turn of the loop does to the open calls of one connection.
  void Turn(size_t line) {
    H2Client& client = *clients_[line];
    if (lines_[line].abort_after-- == 0) {
      for (OpenCall& call : lines_[line].calls) call.cancelled = call.cancelled || !call.stream->closed;
      random_.OneIn(2) ? client.Abort() : client.Close();
    }
    for (OpenCall& call : lines_[line].calls) {
      if (call.stream->closed) continue;
      if (!call.unsent.empty()) {
        const size_t piece = std::min<size_t>(1 + random_.Below(call.unsent.size()), call.unsent.size());
        client.Send(call.stream, call.unsent.substr(0, piece), piece == call.unsent.size());
        call.unsent.erase(0, piece);
      }
      if (call.cancel_after-- == 0) {
        call.cancelled = true;
        client.Reset(call.stream);
      }
    }
  }

  void Reap(size_t line) {
    std::vector<OpenCall>& calls = lines_[line].calls;
    for (size_t i = 0; i < calls.size();) {
      if (!calls[i].stream->closed) {
        ++i;
        continue;
      }
      Count(*clients_[line], calls[i]);
      clients_[line]->Forget(calls[i].stream);
      calls[i] = std::move(calls.back());
      calls.pop_back();
    }
  }

  // Lets go of connections that are over.
  void Sweep() {
    for (size_t i = 0; i < clients_.size();) {
      if (lines_[i].calls.empty() && clients_[i]->goaway()) clients_[i]->Close();
      if (!clients_[i]->gone() || !lines_[i].calls.empty()) {
        ++i;
        continue;
      }
      clients_[i] = std::move(clients_.back());
      clients_.pop_back();
      lines_[i] = std::move(lines_.back());
      lines_.pop_back();
    }
  }

  // What came must be right whatever became of the call: the answers to the first messages, in order.
  void CheckAnswers(const OpenCall& call, const std::vector<std::string>& answers) {
    const std::string version = call.stream->Header("x-model-version");
    for (size_t i = 0; i < answers.size(); ++i) {
      const InferMessage& sent = call.messages[i];
      const InferAnswer answer = call.in_stream ? DecodeStreamAnswer(answers[i]) : DecodeAnswer(answers[i]);
      CHECK_EQ(answer.message.id, sent.id);
      CHECK_EQ(answer.message.model, sent.model);
      if (!answer.error_message.empty()) {
        CHECK(call.bad || call.timed || traffic_.may_be_refused);
        continue;
      }
      CHECK(!call.bad);
      CHECK(answer.message.shape == sent.shape);
      CHECK(answer.message.data == sent.data);
      if (!call.in_stream) CHECK_EQ(answer.message.version, version);
      ++tally_.messages;
    }
  }

  void Count(const H2Client& client, const OpenCall& call) {
    const ClientStream& stream = *call.stream;
    const std::vector<std::string> answers = stream.Messages();
    CHECK(answers.size() <= call.messages.size());
    CheckAnswers(call, answers);
    const int status = stream.grpc_status();
    if (status == 0) {
      CHECK_EQ(answers.size(), call.messages.size());
      ++tally_.answered;
    } else if (status == 4) {
      CHECK(call.timed || traffic_.may_be_refused);
      ++tally_.late;
    } else if (status == 8) {
      CHECK(traffic_.may_be_refused || call.timed);
      CHECK(!stream.Header("grpc-retry-pushback-ms").empty());
      ++tally_.refused;
    } else if (status == 13) {
      CHECK(call.bad);
      ++tally_.failed;
    } else if (status != -1) {
      Fail(__FILE__, __LINE__, "grpc-status " + std::to_string(status) + ": " + stream.Header("grpc-message"));
    } else if (call.cancelled) {
      ++tally_.cancelled;
    } else if (traffic_.may_be_refused && stream.error_code == NGHTTP2_CANCEL) {
      ++tally_.late;
    } else if (!stream.sent || (traffic_.may_go && stream.lost && !client.heard())) {
      ++tally_.unsent;
    } else if (client.TurnedAway(stream)) {
      ++tally_.turned_away;
    } else {
      if (!traffic_.may_be_lost) {
        Fail(__FILE__, __LINE__,
             "call " + call.messages[0].id + " got no answer: " +
                 (stream.lost ? "the connection ended" : "reset with error code ") + std::to_string(stream.error_code));
      }
      ++tally_.lost;
    }
  }

  const uint16_t port_;
  const Traffic& traffic_;
  Random random_;
  const uint32_t thread_;
  uint64_t next_id_ = 0;
  Tally tally_;
  bool server_gone_ = false;
  std::vector<std::unique_ptr<H2Client>> clients_;
  std::vector<Line> lines_;  // of each client
};

}  // namespace

void Tally::Add(const Tally& other) {
  calls += other.calls;
  answered += other.answered;
  failed += other.failed;
  late += other.late;
  refused += other.refused;
  cancelled += other.cancelled;
  unsent += other.unsent;
  turned_away += other.turned_away;
  lost += other.lost;
  messages += other.messages;
}

Tally RunTraffic(uint16_t port, const Traffic& traffic, uint32_t thread, const std::atomic<bool>* stop) {
  Client client(port, traffic, thread);
  const Tally tally = client.Run(stop);
  CHECK_EQ(tally.answered + tally.failed + tally.late + tally.refused + tally.cancelled + tally.unsent +
               tally.turned_away + tally.lost,
           tally.calls);
  return tally;
}

Tally RunThreads(uint16_t port, const Traffic& traffic, uint32_t threads, const std::atomic<bool>* stop) {
  std::vector<Tally> tallies(threads);
  std::vector<std::thread> running;
  for (uint32_t i = 0; i < threads; ++i) {
    running.emplace_back([&, i] { tallies[i] = RunTraffic(port, traffic, i, stop); });
  }
  Tally sum;
  for (uint32_t i = 0; i < threads; ++i) {
    running[i].join();
    sum.Add(tallies[i]);
  }
  return sum;
}

}  // namespace tidegate::test
