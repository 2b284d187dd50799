/* What the README's C program calls its own; the program itself takes the place of the mark below. */
#include <pccheck.h>

#include <stdio.h>
#include <stdlib.h>

static float weights[1000];
static uint64_t step;

static void check(pcc_status status)
{
    char why[1024];
    if (status == PCC_OK)
        return;
    pcc_last_error(why, sizeof why);
    fprintf(stderr, "%s: %s\n", pcc_status_name(status), why);
    exit(1);
}

static void train(float *values, uint64_t *at)
{
    ++*at;
    for (int i = 0; i < 1000; i++)
        values[i] += (float)(*at % 7) + (float)i;
}

int main(void)
{
    double sum = 0;
    @README@
    for (int i = 0; i < 1000; i++)
        sum += weights[i];
    printf("step %d, sum %.0f\n", (int)step, sum);
    return 0;
}
