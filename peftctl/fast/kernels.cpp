// The pointwise parts of a decoder layer, each in one pass over its memory. kernels.py has the same in torch's
// operations, which says what each computes; the tests hold them against each other.
//
// Tensors are contiguous; T is float or bfloat16, and whatever is summed is summed in float. A row is computed by one
// thread from its own numbers alone, so results depend neither on threads nor on what else is in the batch.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(const float *p) { return *p; }

inline float load(const bf16 *p) {
    uint32_t wide = uint32_t(p->bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

inline void store(float *p, float x) { *p = x; }

inline void store(bf16 *p, float x) { // to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    p->bits = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

template <typename T> inline float rounded(float x) {
    T t;
    store(&t, x);
    return load(&t);
}

// e^x to 2 units in the last place: 2^n e^f, |f| <= ln 2 / 2, a Taylor polynomial for e^f; NaN stays NaN
inline float exp_(float x) {
    x = x < -87.f ? -87.f : x;
    x = x > 88.f ? 88.f : x;
    float n = std::nearbyint(x * 1.44269504f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.f + f * (1.f + f * (0.5f + f * (1.f / 6 + f * (1.f / 24 + f * (1.f / 120 + f * (1.f / 720))))));
    uint32_t power = uint32_t(int32_t(n) + 127) << 23;
    float two;
    std::memcpy(&two, &power, 4);
    return y * two;
}

inline float sigmoid(float x) { return 1.f / (1.f + exp_(-x)); }

inline float tanh_(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

enum Activation { SILU = 0, GELU_TANH = 1 };

const float ROOT = 0.79788456f; // sqrt(2 / pi)

inline float activated(float g, int kind) {
    if (kind == SILU)
        return g * sigmoid(g);
    return 0.5f * g * (1.f + tanh_(ROOT * (g + 0.044715f * g * g * g)));
}

inline float slope(float g, int kind) {
    if (kind == SILU) {
        float s = sigmoid(g);
        return s * (1.f + g * (1.f - s));
    }
    float t = tanh_(ROOT * (g + 0.044715f * g * g * g));
    return 0.5f * (1.f + t) + 0.5f * g * (1.f - t * t) * ROOT * (1.f + 3 * 0.044715f * g * g);
}

template <typename T>
void norm(const T *x, const T *weight, T *out, float *inverse, int64_t rows, int64_t width, float eps, float shift) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const T *a = x + i * width;
        float sum = 0;
        for (int64_t j = 0; j < width; j++)
            sum += load(a + j) * load(a + j);
        float r = 1.f / std::sqrt(sum / width + eps);
        inverse[i] = r;
        T *o = out + i * width;
        if (shift == 0) // as Llama rounds
            for (int64_t j = 0; j < width; j++)
                store(o + j, rounded<T>(load(a + j) * r) * load(weight + j));
        else // as Gemma does
            for (int64_t j = 0; j < width; j++)
                store(o + j, load(a + j) * r * (shift + load(weight + j)));
    }
}

template <typename T>
void norm_backward(const T *dy, const T *x, const T *weight, const float *inverse, const T *residual, T *dx,
                   int64_t rows, int64_t width, float shift) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const T *a = x + i * width, *d = dy + i * width;
        float r = inverse[i], dot = 0;
        for (int64_t j = 0; j < width; j++)
            dot += load(d + j) * (shift + load(weight + j)) * load(a + j);
        float c = dot * r * r / width;
        T *o = dx + i * width;
        if (residual)
            for (int64_t j = 0; j < width; j++)
                store(o + j, rounded<T>(r * (load(d + j) * (shift + load(weight + j)) - load(a + j) * c)) +
                                 load(residual + i * width + j));
        else
            for (int64_t j = 0; j < width; j++)
                store(o + j, r * (load(d + j) * (shift + load(weight + j)) - load(a + j) * c));
    }
}

template <typename T> void gate(const T *g, const T *u, T *out, int64_t n, int kind) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++)
        store(out + i, rounded<T>(activated(load(g + i), kind)) * load(u + i));
}

// g and u become their gradients, da what went into the last linear
template <typename T> void gate_backward(T *da, T *g, T *u, int64_t n, int kind) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        float d = load(da + i), gi = load(g + i), ui = load(u + i), a = activated(gi, kind);
        store(g + i, d * ui * slope(gi, kind));
        store(u + i, d * a);
        store(da + i, rounded<T>(a) * ui);
    }
}

// tokens [tokens, heads, width] to rows [n, heads, length, width], rotated; index [n, length], -1 is padding: zeros
template <typename T>
void arrange(const T *x, const int64_t *index, const T *cos, const T *sin, T *out, int64_t n, int64_t heads,
             int64_t length, int64_t width, float scale) {
    int64_t half = width / 2;
#pragma omp parallel for collapse(2)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t s = 0; s < length; s++) {
                int64_t token = index[i * length + s];
                T *o = out + ((i * heads + h) * length + s) * width;
                if (token < 0) {
                    std::memset((void *)o, 0, width * sizeof(T));
                    continue;
                }
                const T *a = x + (token * heads + h) * width;
                if (!cos) {
                    for (int64_t j = 0; j < width; j++)
                        store(o + j, load(a + j) * scale);
                    continue;
                }
                const T *c = cos + token * width, *z = sin + token * width;
                for (int64_t j = 0; j < half; j++) {
                    float lo = load(a + j), hi = load(a + half + j);
                    store(o + j, (lo * load(c + j) - hi * load(z + j)) * scale);
                    store(o + half + j, (hi * load(c + half + j) + lo * load(z + half + j)) * scale);
                }
            }
}

// the way back; with cos and sin, by the transposed rotation
template <typename T>
void restore(const T *rows, const int64_t *index, const T *cos, const T *sin, T *out, int64_t n, int64_t heads,
             int64_t length, int64_t width, float scale) {
    int64_t half = width / 2;
#pragma omp parallel for collapse(2)
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t s = 0; s < length; s++) {
                int64_t token = index[i * length + s];
                if (token < 0)
                    continue;
                const T *a = rows + ((i * heads + h) * length + s) * width;
                T *o = out + (token * heads + h) * width;
                if (!cos) {
                    for (int64_t j = 0; j < width; j++)
                        store(o + j, load(a + j) * scale);
                    continue;
                }
                const T *c = cos + token * width, *z = sin + token * width;
                for (int64_t j = 0; j < half; j++) {
                    float lo = load(a + j), hi = load(a + half + j);
                    store(o + j, (lo * load(c + j) + hi * load(z + half + j)) * scale);
                    store(o + half + j, (hi * load(c + half + j) - lo * load(z + j)) * scale);
                }
            }
}

// the keys that query `row` sees: [first, last)
inline void seen(int64_t row, int64_t queries, int64_t offset, int64_t window, int64_t *first, int64_t *last) {
    *last = offset + row % queries + 1;
    *first = window && *last > window ? *last - window : 0;
}

// scores [n, rows, keys] to probabilities, in place; `rows` are several heads' `queries`, one behind another
template <typename T>
void attend(T *p, int64_t n, int64_t rows, int64_t keys, int64_t queries, int64_t offset, int64_t window) {
#pragma omp parallel for schedule(static, 8)
    for (int64_t i = 0; i < n * rows; i++) {
        T *a = p + i * keys;
        int64_t first, last;
        seen(i % rows, queries, offset, window, &first, &last);
        float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = first; j < last; j++)
            most = load(a + j) > most ? load(a + j) : most;
        for (int64_t j = first; j < last; j++)
            sum += exp_(load(a + j) - most);
        float inverse = 1.f / sum;
        for (int64_t j = first; j < last; j++)
            store(a + j, exp_(load(a + j) - most) * inverse);
        std::memset((void *)a, 0, first * sizeof(T));
        std::memset((void *)(a + last), 0, (keys - last) * sizeof(T));
    }
}

// d, gradients of probabilities p, to those of the scores, in place
template <typename T>
void attend_backward(T *d, const T *p, int64_t n, int64_t rows, int64_t keys, int64_t queries, int64_t offset,
                     int64_t window) {
#pragma omp parallel for schedule(static, 8)
    for (int64_t i = 0; i < n * rows; i++) {
        T *a = d + i * keys;
        const T *b = p + i * keys;
        int64_t first, last;
        seen(i % rows, queries, offset, window, &first, &last);
        float dot = 0;
        for (int64_t j = first; j < last; j++)
            dot += load(a + j) * load(b + j);
        for (int64_t j = first; j < last; j++)
            store(a + j, load(b + j) * (load(a + j) - dot));
        std::memset((void *)a, 0, first * sizeof(T));
        std::memset((void *)(a + last), 0, (keys - last) * sizeof(T));
    }
}

// log-probabilities of labels; with `residual`, the logits become onehot - softmax, times the slope of the cap
template <typename T>
void soften(T *logits, const int64_t *labels, float *logps, int64_t rows, int64_t width, float cap, int residual) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        T *a = logits + i * width;
        float most = -INFINITY, sum = 0;
        if (cap)
            for (int64_t j = 0; j < width; j++)
                store(a + j, cap * tanh_(load(a + j) / cap));
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < width; j++)
            most = load(a + j) > most ? load(a + j) : most;
        for (int64_t j = 0; j < width; j++)
            sum += exp_(load(a + j) - most);
        float chosen = load(a + labels[i]), inverse = 1.f / sum;
        logps[i] = chosen - most - std::log(sum);
        if (!residual)
            continue;
        float slope = cap ? 1.f - chosen * chosen / (cap * cap) : 1.f;
        float own = (1.f - exp_(chosen - most) * inverse) * slope;
        if (cap)
            for (int64_t j = 0; j < width; j++) {
                float t = load(a + j) / cap;
                store(a + j, -exp_(load(a + j) - most) * inverse * (1.f - t * t));
            }
        else
            for (int64_t j = 0; j < width; j++)
                store(a + j, -exp_(load(a + j) - most) * inverse);
        store(a + labels[i], own);
    }
}

} // namespace

#define KERNELS(T, name)                                                                                               \
    extern "C" void norm_##name(const T *x, const T *w, T *o, float *r, int64_t n, int64_t m, float eps, float s) {    \
        norm(x, w, o, r, n, m, eps, s);                                                                                \
    }                                                                                                                  \
    extern "C" void norm_backward_##name(const T *dy, const T *x, const T *w, const float *r, const T *res, T *dx,     \
                                         int64_t n, int64_t m, float s) {                                              \
        norm_backward(dy, x, w, r, res, dx, n, m, s);                                                                  \
    }                                                                                                                  \
    extern "C" void gate_##name(const T *g, const T *u, T *o, int64_t n, int kind) { gate(g, u, o, n, kind); }         \
    extern "C" void gate_backward_##name(T *da, T *g, T *u, int64_t n, int kind) { gate_backward(da, g, u, n, kind); } \
    extern "C" void arrange_##name(const T *x, const int64_t *i, const T *c, const T *s, T *o, int64_t n, int64_t h,   \
                                   int64_t l, int64_t w, float scale) {                                                \
        arrange(x, i, c, s, o, n, h, l, w, scale);                                                                     \
    }                                                                                                                  \
    extern "C" void restore_##name(const T *x, const int64_t *i, const T *c, const T *s, T *o, int64_t n, int64_t h,   \
                                   int64_t l, int64_t w, float scale) {                                                \
        restore(x, i, c, s, o, n, h, l, w, scale);                                                                     \
    }                                                                                                                  \
    extern "C" void attend_##name(T *p, int64_t n, int64_t r, int64_t k, int64_t q, int64_t o, int64_t w) {            \
        attend(p, n, r, k, q, o, w);                                                                                   \
    }                                                                                                                  \
    extern "C" void attend_backward_##name(T *d, const T *p, int64_t n, int64_t r, int64_t k, int64_t q, int64_t o,    \
                                           int64_t w) {                                                                \
        attend_backward(d, p, n, r, k, q, o, w);                                                                       \
    }                                                                                                                  \
    extern "C" void soften_##name(T *a, const int64_t *l, float *o, int64_t n, int64_t w, float cap, int r) {          \
        soften(a, l, o, n, w, cap, r);                                                                                 \
    }

KERNELS(float, float32)
KERNELS(bf16, bfloat16)
