// Which version answers: semantic versions and ranges, on the table that the Python side is run on too, and the route
// table. Run from the root of the repository, where the table lies in tests/data.

#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "route/route_table.h"
#include "route/semver.h"
#include "test/check.h"
#include "test/json.h"
#include "test/random.h"
#include "test/serving_world.h"

namespace tidegate::test {
namespace {

// ---- versions and ranges --------------------------------------------------------------------------------------------

const Json& Table() {
  static const std::unique_ptr<Json> table = [] {
    const std::string path = "tests/data/versions.json";
    std::ifstream file(path);
    if (!file) Fail(__FILE__, __LINE__, "cannot read " + path);
    std::stringstream text;
    text << file.rdbuf();
    std::unique_ptr<Json> json = Json::Parse(text.str());
    CHECK(json != nullptr);
    return json;
  }();
  return *table;
}

SemVer Version(const std::string& text) {
  SemVer version;
  if (!ParseSemVer(text, &version)) Fail(__FILE__, __LINE__, "not a version: " + text);
  return version;
}

std::string Text(const SemVer& version) {
  return std::to_string(version.major) + "." + std::to_string(version.minor) + "." + std::to_string(version.patch) +
         (version.prerelease.empty() ? "" : "-" + version.prerelease);
}

TIDEGATE_TEST(versions_are_read_as_the_table_says) {
  const std::vector<Json>& rows = Table()["versions"].items;
  CHECK(rows.size() > 10);
  for (const Json& row : rows) CHECK_EQ(Text(Version(row.items[0].text)), row.items[1].text);
  CHECK(Table()["not_versions"].items.size() > 10);
  for (const Json& text : Table()["not_versions"].items) {
    SemVer version;
    if (ParseSemVer(text.text, &version)) Fail(__FILE__, __LINE__, "a version: '" + text.text + "'");
  }
}

TIDEGATE_TEST(versions_are_ordered_as_the_table_says) {
  const std::vector<Json>& rows = Table()["comparisons"].items;
  CHECK(rows.size() > 10);
  for (const Json& row : rows) {
    const SemVer a = Version(row.items[0].text);
    const SemVer b = Version(row.items[2].text);
    const std::string& relation = row.items[1].text;
    CHECK(relation == "<" || relation == "=");
    const int order = relation == "<" ? -1 : 0;
    if (Compare(a, b) != order || Compare(b, a) != -order) {
      Fail(__FILE__, __LINE__, row.items[0].text + " " + relation + " " + row.items[2].text + " does not hold");
    }
  }
}

TIDEGATE_TEST(ranges_match_as_the_table_says) {
  const std::vector<Json>& rows = Table()["matches"].items;
  CHECK(rows.size() > 10);
  for (const Json& row : rows) {
    SemVerRange range;
    const std::string& text = row.items[0].text;
    if (!SemVerRange::Parse(text, &range)) Fail(__FILE__, __LINE__, "not a range: '" + text + "'");
    if (range.Matches(Version(row.items[1].text)) != (row.items[2].number == 1)) {
      Fail(__FILE__, __LINE__, "'" + text + "' and " + row.items[1].text);
    }
  }
  CHECK(Table()["not_ranges"].items.size() > 10);
  for (const Json& text : Table()["not_ranges"].items) {
    SemVerRange range;
    if (SemVerRange::Parse(text.text, &range)) Fail(__FILE__, __LINE__, "a range: '" + text.text + "'");
  }
}

TIDEGATE_TEST(the_largest_numbers_do_not_wrap) {
  const std::string most = "18446744073709551615";
  const std::pair<std::string, std::string> inside[] = {
      {"^" + most, most},
      {"~" + most, most + ".3"},
      {most + ".x", most + ".9.9"},
      {"~1." + most, "1." + most + ".7"},
      {"1." + most + ".x", "1." + most + ".7"},
      {"^0." + most, "0." + most + ".1"},
      {"^0.0." + most, "0.0." + most},
      {"^0." + most + "." + most, "0." + most + "." + most},
  };
  for (const auto& [text, version] : inside) {
    SemVerRange range;
    CHECK(SemVerRange::Parse(text, &range));
    if (!range.Matches(Version(version))) Fail(__FILE__, __LINE__, text + " does not match " + version);
  }
  SemVerRange range;
  CHECK(SemVerRange::Parse("~1." + most, &range));
  CHECK(!range.Matches(Version("2.0.0")));
  CHECK(SemVerRange::Parse("^0.0." + most, &range));
  CHECK(!range.Matches(Version("0.1.0")));
}

TIDEGATE_TEST(any_text_is_a_version_a_range_or_nothing) {
  constexpr std::string_view kAlphabet = "0019.-+x*^~<>= ,ra";
  Random random(11);
  std::vector<SemVer> versions;
  int ranges = 0;
  for (int i = 0; i < 200'000; ++i) {
    std::string text(random.Below(9), '\0');
    for (char& c : text) c = kAlphabet[random.Below(kAlphabet.size())];
    SemVer version;
    if (ParseSemVer(text, &version)) {
      CHECK_EQ(Compare(Version(Text(version)), version), 0);
      if (versions.size() < 120) versions.push_back(version);
    }
    SemVerRange range;
    if (SemVerRange::Parse(text, &range)) {
      for (const SemVer& one : versions) ranges += range.Matches(one);
    }
  }
  CHECK_EQ(versions.size(), 120u);
  CHECK(ranges > 1000);
  // A total order.
  for (const SemVer& a : versions) {
    CHECK_EQ(Compare(a, a), 0);
    for (const SemVer& b : versions) {
      CHECK_EQ(Compare(a, b), -Compare(b, a));
      for (const SemVer& c : versions) {
        if (Compare(a, b) <= 0 && Compare(b, c) <= 0) CHECK(Compare(a, c) <= 0);
      }
    }
  }
}

// ---- the route table ------------------------------------------------------------------------------------------------

using Ready = std::shared_ptr<tidegate::Version>;

Ready MakeReady(const std::string& version) { return Load("m", version).version; }

std::string Answer(const RouteTable& table, std::string_view model, std::string_view text) {
  tidegate::Version* version = nullptr;
  const Status status = table.Resolve(model, text, &version);
  if (!status.ok()) return std::string(ReasonName(status.reason));
  return version->spec().version;
}

std::string Why(const RouteTable& table, std::string_view model, std::string_view text) {
  tidegate::Version* version = nullptr;
  return table.Resolve(model, text, &version).message;
}

TIDEGATE_TEST(a_request_finds_the_version_it_names) {
  ModelRoute route;
  route.name = "m";
  for (const char* text : {"1", "1.4.0", "1.10.3", "2.0.0-rc.1", "nightly"}) {
    route.versions.push_back({text, MakeReady(text), ""});
  }
  route.versions.push_back({"1.11.0", nullptr, "it is loading"});
  route.versions.push_back({"3", nullptr, ""});
  route.default_version = "1.4.0";
  route.aliases = {{"stable", "1.4.0"}, {"next", "3"}, {"1", "1.10.3"}, {"lost", "9"}};
  const RouteTable table({route});
  const std::pair<std::string_view, std::string_view> answers[] = {
      {"", "1.4.0"},
      {"1", "1"},  // a version before an alias of that name
      {"1.4.0", "1.4.0"},
      {"nightly", "nightly"},
      {"stable", "1.4.0"},
      {"^1.4", "1.10.3"},  // 1.11.0 is not ready
      {"~1.4", "1.4.0"},
      {"*", "1.10.3"},
      {">=1.0 <1.5", "1.4.0"},
      {">=2.0.0-rc.0 <2.0.1", "2.0.0-rc.1"},
      {"1.11.0", "VERSION_NOT_READY"},
      {"3", "VERSION_NOT_READY"},
      {"next", "VERSION_NOT_READY"},
      {"^1.11", "VERSION_NOT_READY"},
      {"lost", "VERSION_NOT_FOUND"},
      {"1.0", "VERSION_NOT_FOUND"},  // a bare version is looked up as written
      {"^9", "VERSION_NOT_FOUND"},
      {"9", "VERSION_NOT_FOUND"},
      {"\xff\x01", "VERSION_NOT_FOUND"},
  };
  for (const auto& [text, answer] : answers) CHECK_EQ(Answer(table, "m", text), answer);
  CHECK_EQ(Answer(table, "M", ""), "MODEL_NOT_FOUND");
  CHECK_EQ(Answer(table, "", ""), "MODEL_NOT_FOUND");
  CHECK(Why(table, "m", "1.11.0").find("it is loading") != std::string::npos);
  CHECK(Why(table, "m", "9").find("live: 1, 1.4.0, 1.10.3, 2.0.0-rc.1, nightly") != std::string::npos);
}

TIDEGATE_TEST(a_model_without_a_ready_version_says_so) {
  ModelRoute nothing;
  nothing.name = "nothing";
  ModelRoute loading;
  loading.name = "loading";
  loading.versions = {{"1", nullptr, ""}, {"2", nullptr, "the file is damaged"}};
  const RouteTable table({nothing, loading});
  CHECK_EQ(Answer(table, "nothing", ""), "VERSION_NOT_READY");
  CHECK_EQ(Answer(table, "nothing", "1"), "VERSION_NOT_FOUND");
  CHECK(Why(table, "nothing", "1").find("live: none") != std::string::npos);
  CHECK_EQ(Answer(table, "loading", ""), "VERSION_NOT_READY");
  CHECK(Why(table, "loading", "").find("the file is damaged") != std::string::npos);
  CHECK_EQ(Answer(table, "loading", "^1"), "VERSION_NOT_READY");
}

TIDEGATE_TEST(what_a_client_sends_does_not_swell_a_message) {
  ModelRoute route;
  route.name = "m";
  for (int i = 1; i <= 20; ++i) route.versions.push_back({std::to_string(i), MakeReady(std::to_string(i)), ""});
  const RouteTable table({route});
  const std::string long_text(1 << 20, 'v');
  for (const auto& [model, text] : {std::pair("m", long_text), {"x", long_text}}) {
    CHECK(Why(table, model, text).size() < 500);
  }
  CHECK(Why(table, long_text, "").size() < 500);
  CHECK(Why(table, "m", "none").find("8, ...") != std::string::npos);
}

TIDEGATE_TEST(a_version_knows_how_many_tables_name_it) {
  const Ready version = MakeReady("1");
  ModelRoute route;
  route.name = "m";
  route.versions = {{"1", version, ""}};
  {
    const RouteTable first({route});
    const RouteTable second({route});
    CHECK_EQ(version->published.load(), 2);
  }
  CHECK_EQ(version->published.load(), 0);
}

TIDEGATE_TEST(nothing_is_left_of_the_tables) { CheckNothingLives(); }

}  // namespace
}  // namespace tidegate::test

int main(int argc, char** argv) { return tidegate::test::RunAll(argc, argv); }
