// The state of a launch and of one core in it, and the checks that every instruction goes through.

#ifndef PANGU_HOST_CORE_H
#define PANGU_HOST_CORE_H

#include <ucontext.h>

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "include/machine.h"

namespace pangu {
// 910B keeps the top 8 KB of its 192 KB for library scratch.
constexpr int64_t kUbBytes = kIs910b ? 184 * 1024 : 248 * 1024;
constexpr int kNumEvents = 35, kNumIds = 8, kReservedIds = 6, kMaxBuffers = 64, kMaxAlive = 8;
constexpr int kAic = 1, kAiv = 2;
constexpr uint8_t kPoison = 0xff;  // NaN in half, bfloat16_t and float

struct Failure {
    std::string text;
};

struct Clock {
    uint32_t seq[NUM_PIPES] = {};
    void Merge(const Clock& other)
    {
        for (int q = 0; q < NUM_PIPES; ++q) {
            seq[q] = seq[q] > other.seq[q] ? seq[q] : other.seq[q];
        }
    }
};

struct Flag {
    bool set = false, by_queue = false;
    Clock clock;
    uint32_t site = 0;
};

// Who touched a 32-byte block of UB last.
struct UbBlock {
    uint32_t write_seq = 0, write_pipe = 0;
    uint32_t read_seq[NUM_PIPES] = {};
};

enum class State { FIXED, FREE, ALLOCATED, QUEUED, DEQUEUED };
struct Buffer {
    int64_t begin, end;
    int queue;
    State state;
    uint32_t generation = 0;
    int queued_id = -1, freed_id = -1;
    uint32_t site = 0;
};

struct Queue {
    int position, enqueue_event, free_event, depth;
    std::vector<int> buffers;
    std::deque<int> queued;
    size_t next = 0;
};

struct MatmulObject {
    MatmulLimits limits;
    bool in_use = false;
    uint32_t site = 0;
    // Sequence numbers of asynchronous products: the oldest that may still run, the newest, the one to be waited for.
    uint32_t oldest = 0, newest = 0, waited = 0;
};

struct Core {
    int64_t index, block, sub;
    int type;
    uint32_t seq[NUM_PIPES] = {};
    Clock known[NUM_PIPES];
    std::vector<uint32_t> sites[NUM_PIPES];  // site of each instruction, for messages
    Flag flags[kNumEvents][kNumIds];
    bool reserved[kNumEvents][kNumIds] = {};
    std::vector<uint8_t> ub, written;
    std::vector<UbBlock> blocks;
    std::vector<uint64_t> stamps;  // scratch of the overlap check
    uint64_t stamp = 0;
    int64_t ub_used = 0, ub_peak = 0;
    std::vector<Buffer> buffers;
    std::vector<Queue> queues;
    std::vector<MatmulObject> matmuls;
    std::vector<std::pair<uint8_t*, uint32_t>> dirty_lines;
    std::unordered_map<uint8_t*, uint32_t> cached_lines;  // the scalar cache: number of GM accesses when it was read
    void* pipe = nullptr;
    int atomic_type = -1;
    uint32_t atomic_site = 0;
    bool finished = false, at_sync = false;
    std::vector<uint8_t> stack;
    ucontext_t context;
};

struct GmBuffer {
    uint8_t* data = nullptr;
    int64_t bytes = 0;
    bool writable = false, initialised = false, is_workspace = false;
    std::string name;
    uint8_t* storage = nullptr;
    uint8_t* written = nullptr;      // per byte; null where the host initialised all
    uint32_t* writer = nullptr;      // per 2 bytes: the last write, and the last reads from two different pipes or cores
    uint32_t* reader = nullptr;
    uint32_t* other_reader = nullptr;
};

struct GmAccess {
    int32_t core;
    uint8_t pipe;
    int8_t atomic_type;
    uint32_t seq, epoch, site;
};

struct Site {
    const char* api;
    const void* address;
};

struct Counters {
    int64_t gm_bytes_read, gm_bytes_written, workspace_bytes, vector_instructions, cube_flops, ub_bytes_used;
};

struct Launch {
    std::string kernel;
    int64_t num_blocks = 0, instances = 1;
    bool mixed = false, has_sync_hardware = false;
    std::vector<std::unique_ptr<Core>> cores;
    std::vector<GmBuffer> gm;
    std::vector<GmAccess> accesses;
    std::vector<Site> sites;
    std::vector<bool> cube_service;  // by block: its AIC reached REGIST_MATMUL_OBJ
    uint32_t epoch = 1;
    const uint8_t* tiling = nullptr;
    size_t tiling_bytes = 0;
    uint8_t* workspace = nullptr;
    uint8_t* user_workspace = nullptr;
    int removed_sync = -1;
    Counters counters = {};
    ucontext_t context;
    std::string failure;
    bool failed = false;
};

extern Launch* launch;
extern Core* core;

uint32_t SiteOf(const char* api, const void* address);
std::string Place(uint32_t site);
[[noreturn]] void Fail(const char* api, const void* address, const char* rule, const std::string& text);
const char* PipeName(int pipe);
std::string Format(const char* format, ...) __attribute__((format(printf, 1, 2)));

// One instruction: accesses are collected, checked together, and then recorded.
class Instruction {
public:
    Instruction(const char* api, Pipe pipe, const void* address);
    [[noreturn]] void Fail(const char* rule, const std::string& text) const;

    // The bytes [begin, end) of a view, as UB addresses; fails where the view is dead or they leave its buffer.
    void Check(const Local& local, int64_t begin, int64_t end, const char* role) const;
    void CheckAligned(const Local& local, int64_t alignment, const char* role) const;
    void Read(int64_t begin, int64_t end) { reads_.push_back({begin, end}); }
    void Write(int64_t begin, int64_t end) { writes_.push_back({begin, end}); }
    void ReadGm(const uint8_t* begin, int64_t bytes);
    void WriteGm(uint8_t* begin, int64_t bytes, int atomic_type);
    void Commit();
    uint32_t WriterOf(const uint8_t* address) const;

    uint8_t* Ub(int64_t address) const { return core->ub.data() + address; }
    void MarkUnwritten(int64_t begin, int64_t end) const;
    uint32_t seq() const { return seq_; }

private:
    struct Range {
        int64_t begin, end;
    };
    [[noreturn]] void FailSync(const char* what, const std::string& where, int from, uint32_t site) const;
    void CheckGm(GmBuffer& buffer, uint32_t access, const char* what, const uint8_t* at) const;
    GmBuffer& Find(const uint8_t* begin, int64_t bytes) const;
    bool Knows(int pipe, uint32_t seq) const { return core->known[pipe_].seq[pipe] >= seq; }

    const char* api_;
    const void* address_;
    Pipe pipe_;
    uint32_t seq_, site_;
    static std::vector<Range> reads_, writes_;
};
}  // namespace pangu

// The address in the kernel that a function of machine.h was called from.
#define PANGU_HERE __builtin_extract_return_addr(__builtin_return_address(0))

#endif
