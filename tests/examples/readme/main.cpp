// What the README's C++ program calls its own; the program itself takes the place of the mark below.
#include <pccheck.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>

static float weights[1000];
static uint64_t step;

static void check(pcc_status status)
{
    char why[1024];
    if (status == PCC_OK)
        return;
    pcc_last_error(why, sizeof why);
    std::fprintf(stderr, "%s: %s\n", pcc_status_name(status), why);
    std::exit(1);
}

static float gradients[1000];

static void compute_gradients(const float *values)
{
    for (int i = 0; i < 1000; i++)
        gradients[i] = static_cast<float>((step + 1) % 7) + static_cast<float>(i) + 0.0f * values[i];
}

static void update(float *values, uint64_t &at)
{
    at++;
    for (int i = 0; i < 1000; i++)
        values[i] += gradients[i];
}

int main()
{
    @README@
    double sum = 0;
    for (float weight : weights)
        sum += weight;
    std::printf("step %d, sum %.0f\n", static_cast<int>(step), sum);
}
