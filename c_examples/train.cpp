// A training program that saves its whole state after every step, while the next step computes.
//
//   train --region FILE --data CSV [--steps N] [--hidden N] [--kill-after STEP]
//
// A network of two layers learns handwritten digits (64 pixels of 0 to 16 and a label per line) with Adam. Everything
// that the next step depends on is state: weights, both averages of Adam, the state of the random numbers and the step.
// So a run that is killed and resumed ends with the same bytes as one that was not: compare the digests at the end.
// `--kill-after STEP` makes the program kill itself while that step is being saved.
//
// Build: c++ -std=c++17 -O2 train.cpp $(pkg-config --cflags --libs pccheck)
#include <pccheck.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <fstream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// pccheck in C++: three owners and an exception
// ---------------------------------------------------------------------------------------------------------------------

struct Failure : std::runtime_error {
    Failure(pcc_status status, const std::string &text) : std::runtime_error(text), status(status) {}
    pcc_status status;
};

// Turns a failed call into an exception that says what the library knows of it.
void check(pcc_status status)
{
    if (status == PCC_OK)
        return;
    std::string text(1024, '\0');
    uint64_t bytes = pcc_last_error(text.data(), text.size());
    text.resize(std::min<uint64_t>(bytes, text.size()) - (bytes > 0));
    throw Failure(status, std::string(pcc_status_name(status)) + ": " + text);
}

template <auto release> struct Release {
    template <class T> void operator()(T *handle) const { release(handle); }
};
using Store = std::unique_ptr<pcc_store, Release<pcc_close>>;
using Save = std::unique_ptr<pcc_save, Release<pcc_save_free>>;
using Checkpoint = std::unique_ptr<pcc_checkpoint, Release<pcc_checkpoint_close>>;

// ---------------------------------------------------------------------------------------------------------------------
// The network and its state
// ---------------------------------------------------------------------------------------------------------------------

constexpr size_t PIXELS = 64, LABELS = 10, BATCH = 32;

struct Digit {
    std::array<float, PIXELS> pixels;
    int label;
};

// One array of weights with Adam's averages and the gradient. The gradient is made anew in every step: it is not state.
struct Parameter {
    std::array<uint64_t, 2> shape;
    std::vector<float> value, mean, variance, gradient;

    Parameter(uint64_t rows, uint64_t columns)
        : shape{rows, columns}, value(rows * columns), mean(rows * columns), variance(rows * columns),
          gradient(rows * columns)
    {
    }
};

class Network {
  public:
    explicit Network(size_t hidden)
        : hidden_(hidden), parameters_{{hidden, PIXELS}, {1, hidden}, {LABELS, hidden}, {1, LABELS}}
    {
        for (size_t layer : {0, 2}) {
            auto &weight = parameters_[layer];
            float scale = std::sqrt(6.0f / static_cast<float>(weight.shape[0] + weight.shape[1]));
            for (float &value : weight.value)
                value = scale * (2.0f * uniform() - 1.0f);
        }
        describe_all();
    }
    // The tensors point into this object.
    Network(const Network &) = delete;
    Network &operator=(const Network &) = delete;

    // The whole state as the library sees it: for saving, for restoring, and for asking for its size.
    const std::vector<pcc_tensor> &tensors() const { return tensors_; }
    uint64_t step() const { return step_; }

    // Forward and backward: reads weights, writes gradients, returns the mean loss. It changes no tensor that a save
    // may be copying: the random numbers move on here, so what is saved of them is `saved_random_`.
    float compute(const std::vector<Digit> &digits)
    {
        for (auto &parameter : parameters_)
            std::fill(parameter.gradient.begin(), parameter.gradient.end(), 0.0f);
        float loss = 0.0f;
        for (size_t i = 0; i < BATCH; i++)
            loss += backward(digits[random() % digits.size()]);
        return loss / BATCH;
    }

    // Adam. Everything that a save reads changes here, and only here.
    void update()
    {
        constexpr float rate = 0.002f, beta1 = 0.9f, beta2 = 0.999f, epsilon = 1e-8f;
        step_++;
        float correct1 = 1.0f - std::pow(beta1, static_cast<float>(step_));
        float correct2 = 1.0f - std::pow(beta2, static_cast<float>(step_));
        for (auto &p : parameters_) {
            for (size_t i = 0; i < p.value.size(); i++) {
                float gradient = p.gradient[i] / BATCH;
                p.mean[i] = beta1 * p.mean[i] + (1.0f - beta1) * gradient;
                p.variance[i] = beta2 * p.variance[i] + (1.0f - beta2) * gradient * gradient;
                p.value[i] -= rate * (p.mean[i] / correct1) / (std::sqrt(p.variance[i] / correct2) + epsilon);
            }
        }
        saved_random_ = random_;
    }

    // To be called after a restore into `tensors()`.
    void resume() { random_ = saved_random_; }

    float accuracy(const std::vector<Digit> &digits)
    {
        size_t right = 0;
        for (const auto &digit : digits) {
            auto scores = forward(digit);
            right += std::max_element(scores.begin(), scores.end()) - scores.begin() == digit.label;
        }
        return static_cast<float>(right) / static_cast<float>(digits.size());
    }

  private:
    void describe_all()
    {
        const char *names[] = {"hidden.weight", "hidden.bias", "out.weight", "out.bias"};
        for (size_t i = 0; i < parameters_.size(); i++) {
            auto &p = parameters_[i];
            const std::string name = names[i];
            describe(name, PCC_DTYPE_F32, p.shape.data(), 2, p.value.data(), p.value.size() * sizeof(float));
            describe(name + ".mean", PCC_DTYPE_F32, p.shape.data(), 2, p.mean.data(), p.mean.size() * sizeof(float));
            describe(name + ".variance", PCC_DTYPE_F32, p.shape.data(), 2, p.variance.data(),
                     p.variance.size() * sizeof(float));
        }
        describe("random", PCC_DTYPE_U64, nullptr, 0, &saved_random_, sizeof saved_random_);
        describe("step", PCC_DTYPE_U64, nullptr, 0, &step_, sizeof step_);
    }

    void describe(std::string name, uint32_t dtype, const uint64_t *shape, uint32_t rank, void *data, uint64_t bytes)
    {
        pcc_tensor tensor{};
        tensor.struct_bytes = sizeof tensor;
        tensor.name = names_.emplace_back(std::move(name)).c_str();
        tensor.dtype = dtype;
        tensor.shape = shape;
        tensor.rank = rank;
        tensor.data = data;
        tensor.bytes = bytes;
        tensors_.push_back(tensor);
    }

    std::array<float, LABELS> forward(const Digit &digit)
    {
        const auto &w1 = parameters_[0].value, &b1 = parameters_[1].value;
        const auto &w2 = parameters_[2].value, &b2 = parameters_[3].value;
        active_.assign(hidden_, 0.0f);
        for (size_t h = 0; h < hidden_; h++) {
            float sum = b1[h];
            for (size_t i = 0; i < PIXELS; i++)
                sum += w1[h * PIXELS + i] * digit.pixels[i];
            active_[h] = std::max(sum, 0.0f);
        }
        std::array<float, LABELS> scores;
        for (size_t o = 0; o < LABELS; o++) {
            scores[o] = b2[o];
            for (size_t h = 0; h < hidden_; h++)
                scores[o] += w2[o * hidden_ + h] * active_[h];
        }
        return scores;
    }

    float backward(const Digit &digit)
    {
        auto scores = forward(digit);
        float highest = *std::max_element(scores.begin(), scores.end()), total = 0.0f;
        for (float &score : scores)
            total += score = std::exp(score - highest);
        for (float &score : scores)
            score /= total;
        float loss = -std::log(std::max(scores[static_cast<size_t>(digit.label)], 1e-12f));
        scores[static_cast<size_t>(digit.label)] -= 1.0f; // now the gradient of the scores

        const auto &w2 = parameters_[2].value;
        for (size_t o = 0; o < LABELS; o++) {
            parameters_[3].gradient[o] += scores[o];
            for (size_t h = 0; h < hidden_; h++)
                parameters_[2].gradient[o * hidden_ + h] += scores[o] * active_[h];
        }
        for (size_t h = 0; h < hidden_; h++) {
            if (active_[h] <= 0.0f)
                continue;
            float slope = 0.0f;
            for (size_t o = 0; o < LABELS; o++)
                slope += scores[o] * w2[o * hidden_ + h];
            parameters_[1].gradient[h] += slope;
            for (size_t i = 0; i < PIXELS; i++)
                parameters_[0].gradient[h * PIXELS + i] += slope * digit.pixels[i];
        }
        return loss;
    }

    // SplitMix64: its whole state is one number.
    uint64_t random()
    {
        uint64_t z = random_ += 0x9E3779B97F4A7C15;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }
    float uniform() { return static_cast<float>(random() >> 40) / static_cast<float>(1 << 24); }

    size_t hidden_;
    uint64_t step_ = 0;
    uint64_t random_ = 1;
    uint64_t saved_random_ = 1;
    std::vector<Parameter> parameters_;
    std::vector<float> active_;
    std::vector<pcc_tensor> tensors_;
    std::deque<std::string> names_; // a deque, since its strings stay where they are while it grows
};

std::vector<Digit> read_digits(const std::string &path)
{
    std::ifstream file(path);
    std::vector<Digit> digits;
    Digit digit;
    for (char comma; file >> digit.pixels[0];) {
        for (size_t i = 1; i < PIXELS; i++)
            file >> comma >> digit.pixels[i];
        if (!(file >> comma >> digit.label) || digit.label < 0 || digit.label >= static_cast<int>(LABELS))
            throw std::runtime_error(path + ": digit " + std::to_string(digits.size() + 1) +
                                     " is not 64 pixels and a label of 0 to 9");
        for (float &pixel : digit.pixels)
            pixel /= 16.0f;
        digits.push_back(digit);
    }
    if (digits.empty())
        throw std::runtime_error(path + ": expected digits, found none");
    return digits;
}

// FNV-1a over the bytes of all tensors: the same if and only if (nearly) the states are the same.
uint64_t digest(const std::vector<pcc_tensor> &tensors)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (const auto &tensor : tensors)
        for (uint64_t i = 0; i < tensor.bytes; i++)
            hash = (hash ^ static_cast<const unsigned char *>(tensor.data)[i]) * 0x100000001b3;
    return hash;
}

// ---------------------------------------------------------------------------------------------------------------------
// Training with checkpoints
// ---------------------------------------------------------------------------------------------------------------------

struct Arguments {
    std::string region, data;
    uint64_t steps = 300;
    uint64_t hidden = 128;
    std::optional<uint64_t> kill_after;
};

Store open_or_format(const std::string &path, const std::vector<pcc_tensor> &tensors)
{
    constexpr uint32_t in_flight = 2, keep = 1;
    uint64_t payload_bytes;
    check(pcc_payload_bytes(tensors.data(), tensors.size(), nullptr, 0, &payload_bytes));
    pcc_status formatted = pcc_format(path.c_str(), in_flight + keep, payload_bytes, nullptr);
    if (formatted != PCC_ALREADY_EXISTS) // left by the run that is resumed here
        check(formatted);

    pcc_open_options options;
    check(pcc_open_options_init(&options, sizeof options));
    options.max_in_flight = in_flight;
    options.keep = keep;
    options.chunk_bytes = 1 << 20;
    options.staging_bytes = 16 << 20; // holds the whole state, so that `copied` never waits for the disk
    pcc_store *store;
    check(pcc_open(path.c_str(), &options, &store));
    return Store(store);
}

// Restores the newest checkpoint into the network; false where there is none yet.
bool restore(const Store &store, Network &network)
{
    const auto &tensors = network.tensors();
    pcc_checkpoint *handle;
    pcc_status status = pcc_restore(store.get(), nullptr, tensors.data(), tensors.size(), &handle);
    if (status == PCC_NOT_FOUND)
        return false;
    check(status);
    Checkpoint checkpoint(handle);
    pcc_checkpoint_info info{};
    info.struct_bytes = sizeof info;
    check(pcc_checkpoint_get_info(checkpoint.get(), &info));
    network.resume();
    std::printf("resumed from step %" PRIu64 " (generation %" PRIu64 ")\n", info.step, info.generation);
    return true;
}

// Frees the oldest saves that have ended, and reports those that failed. That is no reason to stop training: the
// checkpoints before are intact, and the next save may well succeed.
void collect(std::deque<Save> &saves, int64_t timeout_ms)
{
    while (!saves.empty()) {
        pcc_status status = pcc_save_wait_durable(saves.front().get(), timeout_ms, nullptr);
        if (status == PCC_TIMED_OUT)
            return;
        if (status != PCC_OK) {
            char why[1024] = "";
            pcc_save_error(saves.front().get(), why, sizeof why);
            std::fprintf(stderr, "train: a save failed: %s: %s\n", pcc_status_name(status), why);
        }
        saves.pop_front();
    }
}

int train(const Arguments &arguments)
{
    const auto digits = read_digits(arguments.data);
    Network network(arguments.hidden);
    const auto &tensors = network.tensors();
    // Declared after the network: on every way out the store is closed first, and with it ends all reading of tensors.
    const Store store = open_or_format(arguments.region, tensors);
    if (!restore(store, network))
        std::printf("started from nothing\n");

    std::deque<Save> saves;
    float loss = 0.0f;
    while (network.step() < arguments.steps) {
        loss = network.compute(digits); // meanwhile the save of the step before is copied and written
        if (!saves.empty())
            pcc_save_wait_copied(saves.back().get(), -1); // a failed save does not read either: collect() reports it
        network.update();

        pcc_save *save;
        check(pcc_save_begin(store.get(), network.step(), tensors.data(), tensors.size(), nullptr, 0, nullptr, &save));
        saves.emplace_back(save);
        if (network.step() == arguments.kill_after) {
            std::printf("killed while step %" PRIu64 " is saved\n", network.step());
            std::fflush(stdout);
            std::raise(SIGKILL);
        }
        collect(saves, 0);
    }
    collect(saves, -1);

    std::printf("step %" PRIu64 ", loss %.6f, accuracy %.3f\n", network.step(), static_cast<double>(loss),
                static_cast<double>(network.accuracy(digits)));
    std::printf("digest %016" PRIx64 "\n", digest(tensors));
    return 0;
}

Arguments parse(int argc, char **argv)
{
    Arguments arguments;
    for (int i = 1; i < argc; i += 2) {
        const std::string name = argv[i];
        if (i + 1 == argc)
            throw std::invalid_argument(name + " takes a value");
        if (name == "--region")
            arguments.region = argv[i + 1];
        else if (name == "--data")
            arguments.data = argv[i + 1];
        else if (name == "--steps")
            arguments.steps = std::stoull(argv[i + 1]);
        else if (name == "--hidden")
            arguments.hidden = std::stoull(argv[i + 1]);
        else if (name == "--kill-after")
            arguments.kill_after = std::stoull(argv[i + 1]);
        else
            throw std::invalid_argument("unknown argument " + name);
    }
    if (arguments.region.empty() || arguments.data.empty() || arguments.hidden == 0)
        throw std::invalid_argument("--region, --data and at least one hidden unit are needed");
    return arguments;
}

int main(int argc, char **argv)
{
    try {
        return train(parse(argc, argv));
    } catch (const std::logic_error &error) {
        std::fprintf(stderr, "train: %s\nusage: train --region FILE --data CSV [--steps N] [--hidden N]"
                             " [--kill-after STEP]\n", error.what());
        return 2;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "train: %s\n", error.what());
        return 1;
    }
}
