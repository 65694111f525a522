/* Half formats in plain C: exact to float, rounded to nearest even from float; a NaN stays a quiet NaN. */
static inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_from_bf16(uint16_t x) { return float_from_bits((uint32_t)x << 16); }

static inline uint16_t bf16_from_float(float x) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float float_from_f16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = (uint32_t)(x & 0x7fff) << 13;
    if (magnitude >= 0x0f800000)
        return float_from_bits(sign | magnitude | 0x7f800000 | (magnitude & 0x7fffff ? 0x400000 : 0));
    /* Rebiasing by multiplication makes subnormals right too. */
    return float_from_bits(sign | bits_of_float(float_from_bits(magnitude) * 0x1p112f));
}

static inline uint16_t f16_from_float(float x) {
    uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x1ff));
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    if (bits < 0x38800000) {
        /* Subnormal: adding 1/2 leaves the rounded value, in units of 2^-24, in the low bits. */
        return (uint16_t)(sign | (bits_of_float(float_from_bits(bits) + 0.5f) - 0x3f000000));
    }
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}
