#include "program.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace fastrnn {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "the text of a cell: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0;;) {
    size_t end = text.find(separator, begin);
    parts.push_back(text.substr(begin, end - begin));
    if (end == std::string_view::npos) return parts;
    begin = end + 1;
  }
}

std::vector<std::string_view> words_of(std::string_view text) {
  std::vector<std::string_view> words;
  for (std::string_view word : split(text, ' '))
    if (!word.empty()) words.push_back(word);
  return words;
}

std::string_view trimmed(std::string_view text) {
  size_t begin = text.find_first_not_of(' ');
  return begin == std::string_view::npos ? "" : text.substr(begin, text.find_last_not_of(' ') + 1 - begin);
}

// A whole number below a million, or -1.
int natural(std::string_view word) {
  if (word.empty() || word.size() > 6) return -1;
  int number = 0;
  for (char digit : word) {
    if (digit < '0' || digit > '9') return -1;
    number = 10 * number + (digit - '0');
  }
  return number;
}

int digit_of(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

// What Python's float.hex gives, as in -0x1.8p+1; strtod would depend on the locale. False if it is not that.
bool parse_float(std::string_view word, double& out) {
  bool negative = !word.empty() && word[0] == '-';
  if (negative) word.remove_prefix(1);
  double magnitude = 0;
  if (word == "inf") {
    magnitude = std::numeric_limits<double>::infinity();
  } else if (word == "nan") {
    magnitude = std::numeric_limits<double>::quiet_NaN();
  } else {
    if (word.substr(0, 2) != "0x") return false;
    size_t p = word.find('p');
    if (p == std::string_view::npos) return false;
    int fraction_digits = 0, digits = 0;
    bool after_point = false;
    for (char c : word.substr(2, p - 2)) {
      if (c == '.' && !after_point) {
        after_point = true;
        continue;
      }
      int digit = digit_of(c);
      if (digit < 0 || ++digits > 16) return false;
      magnitude =
          16 * magnitude + digit;  // exact: float.hex writes at most 14 digits, the first of them 0 or 1
      fraction_digits += after_point;
    }
    std::string_view exponent = word.substr(p + 1);
    bool small = !exponent.empty() && exponent[0] == '-';
    if (!exponent.empty() && (small || exponent[0] == '+')) exponent.remove_prefix(1);
    int power = natural(exponent);
    if (power < 0 || digits == 0) return false;
    magnitude = std::ldexp(magnitude, (small ? -power : power) - 4 * fraction_digits);
  }
  out = negative ? -magnitude : magnitude;
  return true;
}

// One line `forward 13 | add 0 4 | ... | out 21 20`, without its first word.
class ProgramReader {
 public:
  ProgramReader(std::string_view name, std::string_view line, int64_t inputs, int64_t results)
      : name_(name), parts_(split(line, '|')) {
    std::vector<std::string_view> first = words_of(parts_[0]);
    int found = first.size() == 1 ? natural(first[0]) : -1;
    if (found != inputs)
      fail(name, " must begin with its ", inputs, " inputs, got '", trimmed(parts_[0]), "'");
    program_.inputs = found;
    for (int k = 0; k < found; ++k) add(k, Operation::Kind::number);
    for (size_t k = 1; k + 1 < parts_.size(); ++k) read_instruction(k);
    read_results(results);
  }

  Program program() && { return std::move(program_); }

 private:
  template <class... Parts>
  [[noreturn]] void wrong(size_t k, const Parts&... parts) const {
    fail(name_, ", part ", k, " ('", trimmed(parts_[k]), "'): ", parts...);
  }

  void add(int value, Operation::Kind kind) {
    values_.push_back(value);
    kinds_.push_back(kind);
  }

  // The value with the number `word` in the text.
  int operand(size_t k, std::string_view word, Operation::Kind kind) const {
    int number = natural(word);
    if (number < 0) wrong(k, "'", word, "' is not the number of a value");
    if (number >= static_cast<int>(values_.size())) wrong(k, "there is no value ", number, " before it");
    if (kinds_[number] != kind)
      wrong(k, "value ", number,
            kind == Operation::Kind::number ? " is a condition, not a number"
                                            : " is a number, not a condition");
    return values_[number];
  }

  void read_instruction(size_t k) {
    std::vector<std::string_view> words = words_of(parts_[k]);
    if (words.empty()) wrong(k, "there is no instruction");
    if (words[0] == "const") {
      double value = 0;
      if (words.size() != 2 || !parse_float(words[1], value))
        wrong(k, "const takes a float as float.hex writes it");
      add(program_.constant(value), Operation::Kind::number);
      return;
    }
    const Operation* operation = find_operation(words[0]);
    if (operation == nullptr) wrong(k, "there is no operation '", words[0], "'");
    if (static_cast<int>(words.size()) != operation->operands + 1)
      wrong(k, operation->name, " takes ", operation->operands, " values");
    Instruction instruction{operation, 0, {-1, -1, -1}};
    for (int i = 0; i < operation->operands; ++i)
      instruction.operands[i] = operand(k, words[i + 1], operation->of_operands[i]);
    add(program_.value_of(instruction), operation->result);
  }

  void read_results(int64_t count) {
    size_t k = parts_.size() - 1;
    std::vector<std::string_view> words = words_of(parts_[k]);
    if (words.empty() || words[0] != "out") wrong(k, "the last part must be 'out' and the results");
    if (static_cast<int64_t>(words.size()) != count + 1)
      wrong(k, "it must have ", count, " results, got ", words.size() - 1);
    for (size_t i = 1; i < words.size(); ++i)
      program_.results.push_back(operand(k, words[i], Operation::Kind::number));
  }

  std::string_view name_;
  std::vector<std::string_view> parts_;
  Program program_;
  // Of each value of the text: its number in the program, where equal instructions are one, and what it is.
  std::vector<int> values_;
  std::vector<Operation::Kind> kinds_;
};

// The lines one after the other, each without its key.
class LineReader {
 public:
  explicit LineReader(const std::string& text) : lines_(split(text, '\n')) {
    if (lines_.back().empty()) lines_.pop_back();
  }

  std::string_view line(std::string_view key) {
    if (next_ == lines_.size()) fail("it ends before the line '", key, "'");
    std::string_view line = lines_[next_++], first = line.substr(0, line.find(' '));
    if (first != key) fail("line ", next_, " must begin with '", key, "', got '", line.substr(0, 40), "'");
    return line.substr(key.size());
  }

  // How many names the line has.
  int64_t names(std::string_view key, int64_t least) {
    int64_t count = static_cast<int64_t>(words_of(line(key)).size());
    if (count < least) fail("'", key, "' must have at least ", least, " names, got ", count);
    return count;
  }

  int64_t number(std::string_view key, int64_t least, int64_t most) {
    std::string_view rest = line(key);
    std::vector<std::string_view> words = words_of(rest);
    int found = words.size() == 1 ? natural(words[0]) : -1;
    if (found < least || found > most)
      fail("'", key, "' must be a number from ", least, " to ", most, ", got '", trimmed(rest), "'");
    return found;
  }

  void end() const {
    if (next_ < lines_.size())
      fail("nothing may follow its last line, got '", lines_[next_].substr(0, 40), "'");
  }

 private:
  std::vector<std::string_view> lines_;
  size_t next_ = 0;
};

bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

int Program::value_of(const Instruction& instruction) {
  for (size_t k = 0; k < instructions.size(); ++k) {
    const Instruction& earlier = instructions[k];
    if (earlier.operation == instruction.operation && same_bits(earlier.constant, instruction.constant) &&
        std::memcmp(earlier.operands, instruction.operands, sizeof earlier.operands) == 0)
      return inputs + static_cast<int>(k);
  }
  instructions.push_back(instruction);
  return inputs + static_cast<int>(instructions.size()) - 1;
}

std::vector<int> Program::append(const Program& other, const std::vector<int>& given) {
  std::vector<int> values = given;
  for (Instruction instruction : other.instructions) {
    for (int& operand : instruction.operands)
      if (operand >= 0) operand = values[operand];
    values.push_back(value_of(instruction));
  }
  std::vector<int> found;
  for (int result : other.results) found.push_back(values[result]);
  return found;
}

bool Program::is_constant(int value, double of) const {
  if (value < inputs) return false;
  const Instruction& instruction = instructions[value - inputs];
  return instruction.operation == nullptr && same_bits(instruction.constant, of);
}

Program UserCell::total_and_backward() const {
  Program both;
  both.inputs = static_cast<int>(backward_inputs());
  std::vector<int> given;
  for (int k = 0; k < both.inputs; ++k) given.push_back(k);
  std::vector<int> totals = both.append(total, given);
  for (int64_t k = 0; k < states; ++k) given[saved + states + k] = totals[k];
  both.results = both.append(backward, given);
  return both;
}

UserCell parse_cell(const std::string& text) {
  constexpr int64_t most_planes = 1000;
  LineReader lines(text);
  UserCell cell{};
  for (std::string_view word : words_of(lines.line("cell"))) cell.name = word;
  cell.gates = lines.names("gates", 1);
  cell.states = lines.names("states", 1);
  cell.parameters = lines.names("parameters", 0);
  cell.inputs = lines.names("inputs", 0);
  cell.recurrent = lines.number("recurrent", 0, 1) == 1;
  cell.saved = lines.number("saved", 1, most_planes);
  cell.distinct_dgh = lines.number("distinct_dgh", 0, 1) == 1;
  if (cell.distinct_dgh && !cell.recurrent) fail("'distinct_dgh 1' needs 'recurrent 1'");
  const int64_t given = cell.parameters + cell.inputs, into = cell.gates * (cell.recurrent ? 2 : 1);
  auto program = [&](const char* name, int64_t inputs, int64_t results) {
    return ProgramReader(name, lines.line(name), inputs, results).program();
  };
  cell.forward = program("forward", into + cell.states + given, cell.states + cell.saved);
  cell.total = program("total", cell.backward_inputs(), cell.states);
  cell.backward = program("backward", cell.backward_inputs(),
                          cell.gates * (cell.distinct_dgh ? 2 : 1) + cell.states + given);
  lines.end();
  return cell;
}

}  // namespace fastrnn
