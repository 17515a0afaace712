/* 16-bit floats in plain C: exact widening, narrowing to nearest even. */
#ifndef LOLA_CORE_HALF_H
#define LOLA_CORE_HALF_H

#include <stdint.h>
#include <string.h>

static inline float lola_bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t lola_float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float lola_from_bfloat16(uint16_t x) { return lola_bits_to_float((uint32_t)x << 16); }

static inline uint16_t lola_to_bfloat16(float x) {
  uint32_t bits = lola_float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40); /* a NaN stays one */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float lola_from_float16(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = x & 0x7fff;
  if (magnitude >= 0x7c00) return lola_bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return lola_bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  float tiny = (float)magnitude * 0x1p-24f; /* subnormal: exact in float32 */
  return sign ? -tiny : tiny;
}

static inline uint16_t lola_to_float16(float x) {
  uint32_t bits = lola_float_to_bits(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds past 65504 */
  if (bits < 0x38800000u) {                                  /* subnormal: let float addition round */
    float shifted = lola_bits_to_float(bits) + 0.5f;         /* units of 2^-24 at 0.5 */
    return (uint16_t)(sign | (lola_float_to_bits(shifted) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
}

#endif
