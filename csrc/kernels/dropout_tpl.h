/* Random bits by counter: 32 bits for a key are two murmur3 finalisers over its index and the row's 64-bit
 * state, so that any key of any row is drawn alone, in any order. Plain C: compilers vectorise it under each
 * ISA.
 */
INLINE uint32_t fmix32(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

uint64_t KERNEL(dropout)(uint64_t state, uint32_t first, int n, uint64_t drop_below) {
    const uint32_t a = (uint32_t)state, c = (uint32_t)(state >> 32);
    /* drop_below < 2^32 */
    const uint32_t threshold = (uint32_t)drop_below;
    uint8_t kept[64];
    for (uint32_t j = 0; j < 64; j++)
        kept[j] = fmix32(fmix32((first + j) * 0x9E3779B1u + a) ^ c) >= threshold;
    uint64_t bits = 0;
    for (int j = 0; j < n; j++) bits |= (uint64_t)kept[j] << j;
    return bits;
}
