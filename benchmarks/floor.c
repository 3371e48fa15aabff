/* AdamW in one pass: reads g, m, v, p and writes m, v, p, 28 bytes a parameter. */
#include <math.h>

void adamw(long size, float *p, float *m, float *v, const float *g, float learning_rate, double decay_m, double decay_v,
           float eps, float weight_decay, float unbias_m, float unbias_v, int threads)
{
    /* 1 - 0.999f is off by 5e-5 */
    const float b1 = decay_m, b2 = decay_v, rest1 = 1 - decay_m, rest2 = 1 - decay_v;
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < size; i++) {
        m[i] = b1 * m[i] + rest1 * g[i];
        v[i] = b2 * v[i] + rest2 * g[i] * g[i];
        p[i] -= learning_rate * (m[i] * unbias_m / (sqrtf(v[i] * unbias_v) + eps) + weight_decay * p[i]);
    }
}
