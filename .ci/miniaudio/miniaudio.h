/*
 * A stand-in for miniaudio.h, with which .ci/install-ollama builds the Ollama server for the tests.
 *
 * Ollama keeps the real header in a folder named vendor, and a Go module never carries those. The header only serves to
 * decode audio input. No test sends any, so here every step of decoding reports an error.
 */
#pragma once

#include <stddef.h>

typedef int ma_result;
typedef unsigned int ma_uint32;
typedef unsigned long long ma_uint64;

typedef struct {
    int unused;
} ma_decoder;

typedef struct {
    int unused;
} ma_decoder_config;

enum { MA_SUCCESS = 0, MA_ERROR = -1 };
enum { ma_format_f32 = 5 };

static inline ma_decoder_config ma_decoder_config_init(int format, ma_uint32 channels, ma_uint32 rate) {
    ma_decoder_config config = {0};
    (void)format, (void)channels, (void)rate;
    return config;
}

static inline ma_result ma_decoder_init_memory(const void *data, size_t size, const ma_decoder_config *config,
                                               ma_decoder *decoder) {
    (void)data, (void)size, (void)config, (void)decoder;
    return MA_ERROR;
}

static inline ma_result ma_decoder_get_length_in_pcm_frames(ma_decoder *decoder, ma_uint64 *length) {
    (void)decoder;
    *length = 0;
    return MA_ERROR;
}

static inline ma_result ma_decoder_read_pcm_frames(ma_decoder *decoder, void *frames, ma_uint64 count,
                                                   ma_uint64 *read) {
    (void)decoder, (void)frames, (void)count;
    if (read) *read = 0;
    return MA_ERROR;
}

static inline ma_result ma_decoder_uninit(ma_decoder *decoder) {
    (void)decoder;
    return MA_SUCCESS;
}
