// Files out of shards, and their checksums: blake2b (RFC 7693) with digests of 8 bytes and no key, of eight messages at a time. Word i
// of all of them lies in one vector; one message alone leaves most of a vector unit idle, because every step of a round waits for the
// one before.

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are taken from memory as they lie there: little endian"
#endif

namespace {

constexpr int LANES = 8, BLOCK = 128, DIGEST = 8;
typedef uint64_t Vector __attribute__((vector_size(8 * LANES)));

constexpr uint64_t IV[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

// The last two of the twelve rounds use the first two rows again.
constexpr uint8_t SIGMA[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

#define TURN(x, by) (((x) >> (by)) | ((x) << (64 - (by))))
#define MIX(a, b, c, d, x, y) \
    a += b + (x); d ^= a; d = TURN(d, 32); c += d; b ^= c; b = TURN(b, 24); \
    a += b + (y); d ^= a; d = TURN(d, 16); c += d; b ^= c; b = TURN(b, 63);

// A lane: what is left of its message, and what of it has been taken.
struct Message {
    const uint8_t *rest = nullptr;
    uint64_t left = 0, taken = 0;
    long number = -1;  // none
};

struct State {
    alignas(64) uint64_t hash[8][LANES], words[16][LANES], taken[LANES], last[LANES];
};

void begin(State &state, int lane) {
    for (int i = 0; i < 8; ++i) state.hash[i][lane] = IV[i];
    state.hash[0][lane] ^= 0x01010000 ^ DIGEST;
}

// The next block of a lane's message to the words. Behind the last one follow zeros.
void fill(State &state, int lane, Message &message) {
    uint8_t padded[BLOCK];
    const uint8_t *block = message.rest;
    const uint64_t some = message.left < BLOCK ? message.left : BLOCK;
    if (some < BLOCK) {
        std::memset(padded, 0, BLOCK);
        if (some) std::memcpy(padded, block, some);
        block = padded;
    }
    for (int i = 0; i < 16; ++i) std::memcpy(&state.words[i][lane], block + 8 * i, 8);
    message.rest += some;
    message.left -= some;
    message.taken += some;
    state.taken[lane] = message.taken;
    state.last[lane] = message.left ? 0 : ~uint64_t{0};
}

void compress(State &state) {
    Vector hash[8], m[16], v[16], counter, last;
    std::memcpy(hash, state.hash, sizeof hash);
    std::memcpy(m, state.words, sizeof m);
    std::memcpy(&counter, state.taken, sizeof counter);
    std::memcpy(&last, state.last, sizeof last);
    for (int i = 0; i < 8; ++i) v[i] = hash[i];
    for (int i = 0; i < 8; ++i) v[8 + i] = Vector{} + IV[i];
    v[12] ^= counter;
    v[14] ^= last;
#pragma GCC unroll 12
    for (int round = 0; round < 12; ++round) {
        const uint8_t *s = SIGMA[round % 10];
        MIX(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]])
        MIX(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]])
        MIX(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]])
        MIX(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]])
        MIX(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]])
        MIX(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]])
        MIX(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]])
        MIX(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]])
    }
    for (int i = 0; i < 8; ++i) hash[i] ^= v[i] ^ v[8 + i];
    std::memcpy(state.hash, hash, sizeof hash);
}

}  // namespace

// digests[i] = that of sizes[i] bytes at messages[i], as a little-endian number. A lane whose message ends takes the next one.
extern "C" void checksums(const uint8_t *const *messages, const uint64_t *sizes, long count, uint64_t *digests) {
    State state;
    std::memset(&state, 0, sizeof state);
    Message lanes[LANES];
    long next = 0, open = count;
    while (open > 0) {
        for (int lane = 0; lane < LANES; ++lane) {
            Message &message = lanes[lane];
            if (message.number < 0 && next < count) {
                message = {messages[next], sizes[next], 0, next};
                begin(state, lane);
                ++next;
            }
            if (message.number >= 0) fill(state, lane, message);
        }
        compress(state);
        for (int lane = 0; lane < LANES; ++lane) {
            Message &message = lanes[lane];
            if (message.number >= 0 && !message.left) {
                digests[message.number] = state.hash[0][lane];
                message.number = -1;
                --open;
            }
        }
    }
}

// sizes[i] bytes at offsets[i] of an open file become row i of a table, with zeros behind them. False: one could not be read whole.
extern "C" bool read_rows(
    const int *handles, const uint64_t *offsets, const uint64_t *sizes, long count, uint64_t width, uint8_t *table) {
    for (long i = 0; i < count; ++i, table += width) {
        uint64_t done = 0;
        while (done < sizes[i]) {
            const ssize_t some = pread(handles[i], table + done, sizes[i] - done, static_cast<off_t>(offsets[i] + done));
            if (some < 0 && errno == EINTR) continue;
            if (some <= 0) return false;
            done += static_cast<uint64_t>(some);
        }
        std::memset(table + done, 0, width - done);
    }
    return true;
}
