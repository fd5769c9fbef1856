// Cores, memory, synchronisation and data movement of the machine model, and the launch.

#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "core.h"

int32_t g_coreType = pangu::kIs910b ? pangu::kAiv : 0;
uint64_t g_tilingKey = 0;

extern "C" void PanguEntry(uint8_t** arguments);
extern "C" int PanguNumArguments();

namespace pangu {
Launch* launch = nullptr;
Core* core = nullptr;
std::vector<Instruction::Range> Instruction::reads_, Instruction::writes_;

constexpr const char* kPipeNames[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};
constexpr struct {
    const char* name;
    Pipe src, dst;
} kEvents[kNumEvents] = {
    {"MTE2_MTE1", MTE2, MTE1}, {"MTE1_MTE2", MTE1, MTE2}, {"MTE1_M", MTE1, M},     {"M_MTE1", M, MTE1},
    {"MTE2_V", MTE2, V},       {"V_MTE2", V, MTE2},       {"MTE3_V", MTE3, V},     {"V_MTE3", V, MTE3},
    {"M_V", M, V},             {"V_M", V, M},             {"V_V", V, V},           {"MTE3_MTE1", MTE3, MTE1},
    {"MTE1_MTE3", MTE1, MTE3}, {"MTE1_V", MTE1, V},       {"MTE2_M", MTE2, M},     {"M_MTE2", M, MTE2},
    {"V_MTE1", V, MTE1},       {"M_FIX", M, FIX},         {"FIX_M", FIX, M},       {"MTE3_MTE2", MTE3, MTE2},
    {"MTE2_MTE3", MTE2, MTE3}, {"S_V", S, V},             {"V_S", V, S},           {"S_MTE2", S, MTE2},
    {"MTE2_S", MTE2, S},       {"S_MTE3", S, MTE3},       {"MTE3_S", MTE3, S},     {"MTE2_FIX", MTE2, FIX},
    {"FIX_MTE2", FIX, MTE2},   {"FIX_S", FIX, S},         {"M_S", M, S},           {"FIX_MTE3", FIX, MTE3},
    {"MTE1_FIX", MTE1, FIX},   {"FIX_MTE1", FIX, MTE1},   {"FIX_FIX", FIX, FIX}};
constexpr int64_t kGuard = 512;             // bytes before and after a GM buffer
constexpr int64_t kSystemWorkspace = 16 << 20;  // RESERVED_WORKSPACE
constexpr int64_t kCacheLine = 64;
constexpr char kOnCubeCore[] = "the kernel goes on on the cube core: put this after REGIST_MATMUL_OBJ or in `if ASCEND_IS_AIV`";

const char* PipeName(int pipe) { return kPipeNames[pipe]; }

std::string Format(const char* format, ...)
{
    char text[512];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof(text), format, values);
    va_end(values);
    return text;
}

// ---- Messages -----------------------------------------------------------------------------------------------------

uint32_t SiteOf(const char* api, const void* address)
{
    static std::unordered_map<const void*, uint32_t> found;
    if (launch->sites.empty()) {
        found.clear();
        launch->sites.push_back({"", nullptr});
    }
    auto entry = found.emplace(address, static_cast<uint32_t>(launch->sites.size()));
    if (entry.second) {
        launch->sites.push_back({api, address});
    }
    return entry.first->second;
}

static std::string Offset(const void* address)
{
    Dl_info found;
    if (!dladdr(address, &found)) {
        return "";
    }
    // The call is the instruction before the address it returns to.
    return Format("%#zx", static_cast<size_t>(static_cast<const char*>(address) - static_cast<char*>(found.dli_fbase)) - 1);
}

// "api at @[offset]": harness.py puts the source line for the offset.
std::string Place(uint32_t site)
{
    const Site& found = launch->sites[site];
    return std::string(found.api) + " at @[" + Offset(found.address) + "]";
}

void Fail(const char* api, const void* address, const char* rule, const std::string& text)
{
    void* frames[48];
    int num_frames = backtrace(frames, 48);
    Dl_info here, there;
    dladdr(address, &here);
    std::string offsets = Offset(address);
    bool inside = false;
    for (int i = 0; i < num_frames; ++i) {
        if (inside && dladdr(frames[i], &there) && there.dli_fbase == here.dli_fbase) {
            offsets += "," + Offset(frames[i]);
        }
        inside = inside || frames[i] == address;
    }
    std::string who = core == nullptr      ? "host"
                      : core->type == kAic ? Format("cube core %d", static_cast<int>(core->index))
                                           : Format("core %d", static_cast<int>(core->index));
    throw Failure{std::string(rule) + ": " + launch->kernel + ", " + who + ", " + api + " at @[" + offsets + "]: " + text};
}

void Fail(const char* api, const char* rule, const char* text) { Fail(api, PANGU_HERE, rule, text); }

// ---- Instructions -------------------------------------------------------------------------------------------------

Instruction::Instruction(const char* api, Pipe pipe, const void* address) : api_(api), address_(address), pipe_(pipe)
{
    reads_.clear();
    writes_.clear();
    if (core->type == kAic && pipe != S) {
        Fail("cube core", kOnCubeCore);
    }
    Clock& known = core->known[pipe];
    // The scalar unit issues instructions after its own waits.
    for (int q = V; q < NUM_PIPES; ++q) {
        known.seq[q] = std::max(known.seq[q], core->known[S].seq[q]);
    }
    if (pipe == S || (pipe == V && !kIs910b)) {
        known.seq[pipe] = core->seq[pipe];
    }
    site_ = SiteOf(api, address);
    seq_ = ++core->seq[pipe];
    core->sites[pipe].push_back(site_);
}

void Instruction::Fail(const char* rule, const std::string& text) const { pangu::Fail(api_, address_, rule, text); }

void Instruction::Check(const Local& local, int64_t begin, int64_t end, const char* role) const
{
    if (local.buffer < 0 || local.buffer >= static_cast<int>(core->buffers.size())) {
        Fail("no buffer", Format("%s is not a tensor of a buffer from InitBuffer", role));
    }
    const Buffer& buffer = core->buffers[local.buffer];
    if (buffer.generation != local.generation || buffer.state == State::FREE) {
        Fail("freed tensor", Format("%s was freed", role));
    }
    if (begin < buffer.begin || end > local.limit) {
        Fail("out of bounds", Format("%s covers bytes [%lld, %lld) of a buffer of %lld", role,
                                     static_cast<long long>(begin - buffer.begin),
                                     static_cast<long long>(end - buffer.begin),
                                     static_cast<long long>(buffer.end - buffer.begin)));
    }
}

void Instruction::CheckAligned(const Local& local, int64_t alignment, const char* role) const
{
    if (local.begin % alignment != 0) {
        Fail("alignment", Format("%s starts at UB address %lld, not a multiple of %lld", role,
                                 static_cast<long long>(local.begin), static_cast<long long>(alignment)));
    }
}

void Instruction::FailSync(const char* what, const std::string& where, int from, uint32_t site) const
{
    std::string need = from == pipe_ ? Format("PipeBarrier<PIPE_%s>", PipeName(from))
                                     : Format("SetFlag and WaitFlag<HardEvent::%s_%s>", PipeName(from), PipeName(pipe_));
    Fail("missing sync", Format("%s %s %s ", PipeName(pipe_), what, where.c_str()) + Place(site) + " on " +
                             PipeName(from) + ": needs " + need);
}

void Instruction::Commit()
{
    for (const Range& range : reads_) {
        if (range.begin == range.end) {
            continue;
        }
        const void* open = memchr(core->written.data() + range.begin, 0, range.end - range.begin);
        if (open != nullptr) {
            Fail("uninitialised read",
                 Format("UB address %lld was never written (of the bytes [%lld, %lld) that are read)",
                        static_cast<long long>(static_cast<const uint8_t*>(open) - core->written.data()),
                        static_cast<long long>(range.begin), static_cast<long long>(range.end)));
        }
        for (int64_t i = range.begin / kBlock; i <= (range.end - 1) / kBlock; ++i) {
            const UbBlock& block = core->blocks[i];
            if (block.write_seq > 0 && !Knows(block.write_pipe, block.write_seq)) {
                FailSync("reads what is written by", Format("UB block %lld, the result of", static_cast<long long>(i)),
                         block.write_pipe, core->sites[block.write_pipe][block.write_seq - 1]);
            }
        }
    }
    for (const Range& range : writes_) {
        if (range.begin == range.end) {
            continue;
        }
        for (int64_t i = range.begin / kBlock; i <= (range.end - 1) / kBlock; ++i) {
            const UbBlock& block = core->blocks[i];
            if (block.write_seq > 0 && !Knows(block.write_pipe, block.write_seq)) {
                FailSync("overwrites", Format("UB block %lld, the result of", static_cast<long long>(i)), block.write_pipe,
                         core->sites[block.write_pipe][block.write_seq - 1]);
            }
            for (int q = 0; q < NUM_PIPES; ++q) {
                // V issues in order: a read comes before the write of a later instruction.
                if (block.read_seq[q] > 0 && !(q == V && pipe_ == V) && !Knows(q, block.read_seq[q])) {
                    FailSync("overwrites", Format("UB block %lld, an input of", static_cast<long long>(i)), q,
                             core->sites[q][block.read_seq[q] - 1]);
                }
            }
        }
    }
    for (const Range& range : reads_) {
        for (int64_t i = range.begin / kBlock; range.begin < range.end && i <= (range.end - 1) / kBlock; ++i) {
            core->blocks[i].read_seq[pipe_] = seq_;
        }
    }
    for (const Range& range : writes_) {
        if (range.begin == range.end) {
            continue;
        }
        memset(core->written.data() + range.begin, 1, range.end - range.begin);
        for (int64_t i = range.begin / kBlock; i <= (range.end - 1) / kBlock; ++i) {
            core->blocks[i].write_seq = seq_;
            core->blocks[i].write_pipe = pipe_;
        }
    }
}

void Instruction::MarkUnwritten(int64_t begin, int64_t end) const
{
    memset(core->written.data() + begin, 0, end - begin);
    memset(core->ub.data() + begin, kPoison, end - begin);
}

GmBuffer& Instruction::Find(const uint8_t* begin, int64_t bytes) const
{
    for (GmBuffer& buffer : launch->gm) {
        if (begin >= buffer.data && begin + bytes <= buffer.data + buffer.bytes) {
            return buffer;
        }
    }
    Fail("out of bounds", Format("%lld bytes of GM that are not inside one argument or the workspace",
                                 static_cast<long long>(bytes)));
}

// `what` is done to granules that `access` did something to: fails where the two are not ordered.
void Instruction::CheckGm(GmBuffer& buffer, uint32_t access, const char* what, const uint8_t* at) const
{
    const GmAccess& earlier = launch->accesses[access - 1];
    std::string where = Format("byte %lld of %s, ", static_cast<long long>(at - buffer.data), buffer.name.c_str());
    if (earlier.core != core->index) {
        if (earlier.epoch == launch->epoch) {
            Fail("cross-core conflict", Format("%s %swhich core %d touched in ", what, where.c_str(), earlier.core) +
                                            Place(earlier.site) + ": nothing orders the two cores");
        }
        return;
    }
    bool same_instruction = earlier.pipe == pipe_ && earlier.seq == seq_;
    if (!same_instruction && !Knows(earlier.pipe, earlier.seq)) {
        FailSync(what, where + "touched by", earlier.pipe, earlier.site);
    }
}

void Instruction::ReadGm(const uint8_t* begin, int64_t bytes)
{
    if (bytes == 0) {
        return;
    }
    GmBuffer& buffer = Find(begin, bytes);
    if (buffer.written != nullptr) {
        const uint8_t* flags = buffer.written + (begin - buffer.data);
        const void* open = memchr(flags, 0, bytes);
        if (open != nullptr) {
            Fail("uninitialised read", Format("byte %lld of %s was never written",
                                              static_cast<long long>(static_cast<const uint8_t*>(open) - buffer.written),
                                              buffer.name.c_str()));
        }
    }
    launch->accesses.push_back({static_cast<int32_t>(core->index), pipe_, -1, seq_, launch->epoch, site_});
    uint32_t now = static_cast<uint32_t>(launch->accesses.size());
    uint32_t checked = 0, seen_reader = 0;
    bool seen_same = true;
    int64_t first = (begin - buffer.data) / 2, last = (begin + bytes - 1 - buffer.data) / 2;
    for (int64_t i = first; i <= last; ++i) {
        if (buffer.writer[i] != checked) {
            checked = buffer.writer[i];
            if (checked > 0) {
                CheckGm(buffer, checked, "reads", buffer.data + i * 2);
            }
        }
        uint32_t reader = buffer.reader[i];
        if (reader != seen_reader) {
            seen_reader = reader;
            const GmAccess* earlier = reader > 0 ? &launch->accesses[reader - 1] : nullptr;
            seen_same = earlier == nullptr || (earlier->core == core->index && earlier->pipe == pipe_);
        }
        if (!seen_same) {
            buffer.other_reader[i] = reader;
        }
        buffer.reader[i] = now;
    }
    launch->counters.gm_bytes_read += bytes;
    launch->counters.workspace_bytes += buffer.is_workspace ? bytes : 0;
}

void Instruction::WriteGm(uint8_t* begin, int64_t bytes, int atomic_type)
{
    if (bytes == 0) {
        return;
    }
    GmBuffer& buffer = Find(begin, bytes);
    if (!buffer.writable) {
        Fail("write to input", Format("%s is an input", buffer.name.c_str()));
    }
    uint8_t* flags = buffer.written == nullptr ? nullptr : buffer.written + (begin - buffer.data);
    if (flags != nullptr && atomic_type >= 0 && memchr(flags, 0, bytes) != nullptr) {
        Fail("uninitialised read", Format("adds to bytes of %s that were never written", buffer.name.c_str()));
    }
    launch->accesses.push_back({static_cast<int32_t>(core->index), pipe_, static_cast<int8_t>(atomic_type), seq_,
                                launch->epoch, site_});
    uint32_t now = static_cast<uint32_t>(launch->accesses.size());
    uint32_t checked[3] = {};
    int64_t first = (begin - buffer.data) / 2, last = (begin + bytes - 1 - buffer.data) / 2;
    for (int64_t i = first; i <= last; ++i) {
        const uint32_t earlier[3] = {buffer.writer[i], buffer.reader[i], buffer.other_reader[i]};
        for (int kind = 0; kind < 3; ++kind) {
            if (earlier[kind] != checked[kind]) {
                checked[kind] = earlier[kind];
                bool both_add = kind == 0 && atomic_type >= 0 && checked[kind] > 0 &&
                                launch->accesses[checked[kind] - 1].atomic_type == atomic_type;
                if (checked[kind] > 0 && !both_add) {
                    CheckGm(buffer, checked[kind], "overwrites", buffer.data + i * 2);
                }
            }
        }
        buffer.writer[i] = now;
    }
    if (flags != nullptr) {
        memset(flags, 1, bytes);
    }
    launch->counters.gm_bytes_written += bytes;
    launch->counters.workspace_bytes += buffer.is_workspace ? bytes : 0;
}

uint32_t Instruction::WriterOf(const uint8_t* address) const
{
    const GmBuffer& buffer = Find(address, 1);
    return buffer.writer[(address - buffer.data) / 2];
}

// ---- Synchronisation ----------------------------------------------------------------------------------------------

static void Set(const char* api, const void* address, int event, int id, bool by_queue)
{
    Flag& flag = core->flags[event][id];
    if (flag.set) {
        Fail(api, address, "event flag", Format("HardEvent::%s id %d is set already by ", kEvents[event].name, id) +
                                             Place(flag.site) + " and was not waited for");
    }
    Pipe src = kEvents[event].src;
    Clock clock = core->known[src];
    for (int q = V; q < NUM_PIPES; ++q) {
        clock.seq[q] = std::max(clock.seq[q], core->known[S].seq[q]);
    }
    clock.seq[src] = core->seq[src];
    flag.set = true;
    flag.by_queue = by_queue;
    flag.clock = clock;
    flag.site = SiteOf(api, address);
}

static void Wait(const char* api, const void* address, int event, int id)
{
    Flag& flag = core->flags[event][id];
    if (!flag.set) {
        Fail(api, address, "event flag", Format("HardEvent::%s id %d is not set: the core would hang", kEvents[event].name, id));
    }
    flag.set = false;
    core->known[kEvents[event].dst].Merge(flag.clock);
}

static void CheckId(const char* api, const void* address, int event, int64_t id)
{
    if (id < 0 || id >= kNumIds || (id >= kReservedIds && !core->reserved[event][id])) {
        Fail(api, address, "event flag", Format("HardEvent::%s id %lld: ids are 0 to 5, and those of AllocEventID",
                                                kEvents[event].name, static_cast<long long>(id)));
    }
}

void SetFlag(const char* api, int event, int64_t id)
{
    if (core->type == kAic) {
        return;
    }
    CheckId(api, PANGU_HERE, event, id);
    Set(api, PANGU_HERE, event, static_cast<int>(id), false);
}

void WaitFlag(const char* api, int event, int64_t id)
{
    if (core->type == kAic) {
        return;
    }
    CheckId(api, PANGU_HERE, event, id);
    if (core->flags[event][id].set && core->flags[event][id].by_queue) {
        Fail(api, PANGU_HERE, "event flag", Format("HardEvent::%s id %d is a queue's flag", kEvents[event].name,
                                                   static_cast<int>(id)));
    }
    Wait(api, PANGU_HERE, event, static_cast<int>(id));
}

static void BarrierAll()
{
    for (Clock& known : core->known) {
        std::copy(core->seq, core->seq + NUM_PIPES, known.seq);
    }
    for (MatmulObject& matmul : core->matmuls) {
        // The cube core is another core on 910B: a barrier does not wait for its asynchronous products.
        for (Clock& known : core->known) {
            if (matmul.oldest > 0) {
                known.seq[M] = std::min(known.seq[M], matmul.oldest - 1);
            }
        }
    }
}

void Barrier(const char*, int pipe)
{
    if (pipe < 0) {
        BarrierAll();
    } else {
        core->known[pipe].seq[pipe] = core->seq[pipe];
    }
}

void SyncAll(const char* api)
{
    if (!launch->has_sync_hardware) {
        Fail(api, PANGU_HERE, "SyncAll", "needs KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0 or KERNEL_TYPE_MIX_AIC_1_2)");
    }
    BarrierAll();
    core->at_sync = true;
    Core* self = core;
    swapcontext(&self->context, &launch->context);
}

int AllocEvent(const char* api, int event)
{
    for (int id = 0; id < kNumIds; ++id) {
        if (!core->reserved[event][id]) {
            core->reserved[event][id] = true;
            return id;
        }
    }
    Fail(api, PANGU_HERE, "event flag", Format("all 8 ids of HardEvent::%s are taken", kEvents[event].name));
}

void ReleaseEvent(const char* api, int event, int64_t id)
{
    if (id < 0 || id >= kNumIds || !core->reserved[event][id]) {
        Fail(api, PANGU_HERE, "event flag", Format("HardEvent::%s id %d is not allocated", kEvents[event].name,
                                                   static_cast<int>(id)));
    }
    core->reserved[event][id] = false;
}

int FetchEvent(const char* api, int event)
{
    for (int id = 0; id < kNumIds; ++id) {
        if (!core->reserved[event][id]) {
            return id;
        }
    }
    Fail(api, PANGU_HERE, "event flag", Format("all 8 ids of HardEvent::%s are taken", kEvents[event].name));
}

bool SyncIsOn(int statement) { return statement != launch->removed_sync; }

// ---- Buffers and queues -------------------------------------------------------------------------------------------

void StartPipe(const char* api, void* pipe)
{
    if (core->pipe != nullptr && core->pipe != pipe) {
        Fail(api, PANGU_HERE, "TPipe", "another TPipe is alive");
    }
    core->pipe = pipe;
}

// Runs in destructors, so it never fails.
void EndPipe(const char*, void* pipe)
{
    if (core->pipe == pipe) {
        core->pipe = nullptr;
    }
}

void* CurrentPipe(const char* api)
{
    if (core->pipe == nullptr) {
        Fail(api, PANGU_HERE, "TPipe", "no TPipe is alive");
    }
    return core->pipe;
}

static void Idle(const char* api, const void* address)
{
    for (Buffer& buffer : core->buffers) {
        if (buffer.state != State::FIXED && buffer.state != State::FREE) {
            Fail(api, address, "queue", "a tensor from AllocTensor is not freed: " + Place(buffer.site));
        }
        if (buffer.freed_id >= 0) {
            int event = core->queues[buffer.queue].free_event;
            Wait(api, address, event, buffer.freed_id);
            core->reserved[event][buffer.freed_id] = false;
            buffer.freed_id = -1;
        }
    }
}

void ResetPipe(const char* api)
{
    Idle(api, PANGU_HERE);
    for (Buffer& buffer : core->buffers) {
        ++buffer.generation;
    }
    for (Queue& queue : core->queues) {
        queue.buffers.clear();
    }
    core->ub_used = 0;
}

static int AddBuffer(const char* api, const void* address, int64_t bytes, int queue, State state)
{
    if (core->type == kAic) {
        Fail(api, address, "cube core", kOnCubeCore);
    }
    if (core->pipe == nullptr) {
        Fail(api, address, "TPipe", "no TPipe is alive");
    }
    if (bytes == 0) {
        Fail(api, address, "UB capacity", "a buffer of 0 bytes");
    }
    bytes = (bytes + kBlock - 1) / kBlock * kBlock;
    if (core->ub_used + bytes > kUbBytes) {
        Fail(api, address, "UB capacity", Format("%lld bytes in use, %lld more do not fit in %lld",
                                                 static_cast<long long>(core->ub_used), static_cast<long long>(bytes),
                                                 static_cast<long long>(kUbBytes)));
    }
    if (static_cast<int>(core->buffers.size()) == kMaxBuffers) {
        Fail(api, address, "UB capacity", "more than 64 buffers");
    }
    Buffer buffer = {core->ub_used, core->ub_used + bytes, queue, state};
    core->ub_used += bytes;
    core->ub_peak = std::max(core->ub_peak, core->ub_used);
    memset(core->ub.data() + buffer.begin, kPoison, bytes);
    memset(core->written.data() + buffer.begin, 0, bytes);
    core->buffers.push_back(buffer);
    return static_cast<int>(core->buffers.size()) - 1;
}

static Local ViewOf(int index)
{
    const Buffer& buffer = core->buffers[index];
    return {index, buffer.generation, buffer.begin, buffer.end};
}

int NewQueue(const char* api, int position, int enqueue_event, int free_event, int32_t depth, uint32_t num,
             uint32_t bytes)
{
    if (num == 0) {
        Fail(api, PANGU_HERE, "queue", "a queue of 0 buffers");
    }
    int index = static_cast<int>(core->queues.size());
    core->queues.push_back({position, enqueue_event, free_event, depth, {}, {}, 0});
    for (uint32_t i = 0; i < num; ++i) {
        core->queues[index].buffers.push_back(AddBuffer(api, PANGU_HERE, bytes, index, State::FREE));
    }
    return index;
}

Local NewBuffer(const char* api, uint32_t bytes) { return ViewOf(AddBuffer(api, PANGU_HERE, bytes, -1, State::FIXED)); }

static Queue& QueueOf(const char* api, const void* address, int queue)
{
    if (queue < 0) {
        Fail(api, address, "queue", "the queue has no buffers: InitBuffer comes first");
    }
    return core->queues[queue];
}

Local QueueAlloc(const char* api, int index)
{
    Queue& queue = QueueOf(api, PANGU_HERE, index);
    int alive = 0;
    for (const Buffer& buffer : core->buffers) {
        alive += buffer.queue >= 0 && buffer.state != State::FREE && core->queues[buffer.queue].position == queue.position;
    }
    for (size_t i = 0; i < queue.buffers.size(); ++i) {
        int number = queue.buffers[(queue.next + i) % queue.buffers.size()];
        Buffer& buffer = core->buffers[number];
        if (buffer.state != State::FREE) {
            continue;
        }
        if (alive == kMaxAlive) {
            Fail(api, PANGU_HERE, "queue", "more than 8 tensors of one TPosition are alive");
        }
        queue.next = (queue.next + i + 1) % queue.buffers.size();
        buffer.state = State::ALLOCATED;
        ++buffer.generation;
        buffer.site = SiteOf(api, PANGU_HERE);
        if (buffer.freed_id >= 0) {
            Wait(api, PANGU_HERE, queue.free_event, buffer.freed_id);
            core->reserved[queue.free_event][buffer.freed_id] = false;
            buffer.freed_id = -1;
        }
        memset(core->ub.data() + buffer.begin, kPoison, buffer.end - buffer.begin);
        memset(core->written.data() + buffer.begin, 0, buffer.end - buffer.begin);
        return ViewOf(number);
    }
    Fail(api, PANGU_HERE, "queue", Format("all %zu buffers of the queue are in use: the core would hang", queue.buffers.size()));
}

static Buffer& OwnBuffer(const char* api, const void* address, int index, const Local& tensor)
{
    if (tensor.buffer < 0 || core->buffers[tensor.buffer].queue != index) {
        Fail(api, address, "queue", "the tensor is not from this queue");
    }
    Buffer& buffer = core->buffers[tensor.buffer];
    if (buffer.generation != tensor.generation || buffer.state == State::FREE) {
        Fail(api, address, "queue", "the tensor was freed");
    }
    return buffer;
}

static int QueueEvent(const char* api, const void* address, int event)
{
    for (int id = 0; id < kNumIds; ++id) {
        if (!core->reserved[event][id]) {
            core->reserved[event][id] = true;
            Set(api, address, event, id, true);
            return id;
        }
    }
    Fail(api, address, "event flag", Format("all 8 ids of HardEvent::%s are taken", kEvents[event].name));
}

void QueueEnque(const char* api, int index, const Local& tensor)
{
    Queue& queue = QueueOf(api, PANGU_HERE, index);
    Buffer& buffer = OwnBuffer(api, PANGU_HERE, index, tensor);
    if (buffer.state == State::QUEUED) {
        Fail(api, PANGU_HERE, "queue", "the tensor is in the queue already");
    }
    if (static_cast<int>(queue.queued.size()) == queue.depth) {
        Fail(api, PANGU_HERE, "queue", Format("more than depth %d tensors in the queue", queue.depth));
    }
    buffer.queued_id = QueueEvent(api, PANGU_HERE, queue.enqueue_event);
    buffer.state = State::QUEUED;
    queue.queued.push_back(tensor.buffer);
}

Local QueueDeque(const char* api, int index)
{
    Queue& queue = QueueOf(api, PANGU_HERE, index);
    if (queue.queued.empty()) {
        Fail(api, PANGU_HERE, "queue", "the queue is empty: the core would hang");
    }
    int number = queue.queued.front();
    queue.queued.pop_front();
    Buffer& buffer = core->buffers[number];
    Wait(api, PANGU_HERE, queue.enqueue_event, buffer.queued_id);
    core->reserved[queue.enqueue_event][buffer.queued_id] = false;
    buffer.queued_id = -1;
    buffer.state = State::DEQUEUED;
    return ViewOf(number);
}

void QueueFree(const char* api, int index, const Local& tensor)
{
    Queue& queue = QueueOf(api, PANGU_HERE, index);
    Buffer& buffer = OwnBuffer(api, PANGU_HERE, index, tensor);
    if (buffer.state != State::DEQUEUED) {
        Fail(api, PANGU_HERE, "queue", "the tensor did not come from DeQue");
    }
    buffer.freed_id = QueueEvent(api, PANGU_HERE, queue.free_event);
    buffer.state = State::FREE;
}

int QueueLength(const char* api, int index, bool idle)
{
    Queue& queue = QueueOf(api, PANGU_HERE, index);
    if (!idle) {
        return static_cast<int>(queue.queued.size());
    }
    int found = 0;
    for (int number : queue.buffers) {
        found += core->buffers[number].state == State::FREE;
    }
    return found;
}

// ---- System -------------------------------------------------------------------------------------------------------

int64_t BlockIdx() { return core->index; }
int64_t BlockNum() { return launch->num_blocks; }
int64_t SubBlockIdx() { return core->sub; }
int64_t SubBlockNum() { return launch->instances; }

void TaskType(const char* api, int type)
{
    bool mixed = type == 5;  // KERNEL_TYPE_MIX_AIC_1_2
    bool sync = mixed || type == 2;
    if (mixed != launch->mixed || sync != launch->has_sync_hardware || (type != 0 && type != 2 && type != 5)) {
        Fail(api, PANGU_HERE, "kernel type",
             "the launch runs AIV_ONLY, MIX_AIV_1_0 or MIX_AIC_1_2, named once in the kernel's own source file");
    }
}

uint8_t* UserWorkspace(const char* api, uint8_t* workspace)
{
    if (workspace != launch->workspace || workspace == nullptr) {
        Fail(api, PANGU_HERE, "workspace", "this is not the entry's workspace, or the tiling asked for none");
    }
    return launch->user_workspace;
}

uint8_t* SystemWorkspace() { return launch->workspace; }

void CopyTiling(const char* api, void* to, const uint8_t* from, size_t size)
{
    if (from != launch->tiling || size != launch->tiling_bytes) {
        Fail(api, PANGU_HERE, "tiling data", Format("the struct has %zu bytes, the launch got %zu", size, launch->tiling_bytes));
    }
    memcpy(to, from, size);
}

Global Bind(const char* api, void* pointer, int64_t bytes, uint32_t alignment)
{
    uint8_t* begin = static_cast<uint8_t*>(pointer);
    if (begin == nullptr) {
        return {};
    }
    if (reinterpret_cast<uintptr_t>(begin) % alignment != 0) {
        Fail(api, PANGU_HERE, "alignment", Format("the address is not a multiple of the element's %u bytes", alignment));
    }
    for (const GmBuffer& buffer : launch->gm) {
        if (begin >= buffer.data && begin <= buffer.data + buffer.bytes) {
            if (bytes < -1 || (bytes >= 0 && begin + bytes > buffer.data + buffer.bytes)) {
                Fail(api, PANGU_HERE, "out of bounds", Format("%lld bytes from byte %lld of %s, which has %lld",
                     static_cast<long long>(bytes), static_cast<long long>(begin - buffer.data), buffer.name.c_str(),
                     static_cast<long long>(buffer.bytes)));
            }
            return {begin, bytes < 0 ? buffer.data + buffer.bytes : begin + bytes};
        }
    }
    Fail(api, PANGU_HERE, "out of bounds", "the address is in no argument, nor in the user's workspace");
}

// ---- Data movement ------------------------------------------------------------------------------------------------

static void CheckGlobal(const Instruction& instruction, const Global& global, const uint8_t* begin, int64_t bytes)
{
    if (global.begin == nullptr) {
        instruction.Fail("out of bounds", "the GlobalTensor has no buffer (an absent optional input?)");
    }
    if (begin + bytes > global.limit) {
        instruction.Fail("out of bounds", Format("%lld bytes of GM, %lld of them past the GlobalTensor's buffer",
                         static_cast<long long>(bytes), static_cast<long long>(begin + bytes - global.limit)));
    }
}

// False where there is nothing to move.
static bool CheckCopy(const Instruction& instruction, const Global& global, const Local& local, Type type, const Copy2d& copy)
{
    int64_t size = kSize[static_cast<int>(type)];
    if (copy.count == 0 || copy.length == 0) {
        if (!kIs910b) {
            instruction.Fail("range", "a copy of nothing is documented on 910B only");
        }
        return false;
    }
    if (copy.count > 4095 || (copy.pad_bytes && copy.length > 2097151)) {
        instruction.Fail("range", Format("blockCount %lld (at most 4095), blockLen %lld (at most 2097151)",
                         static_cast<long long>(copy.count), static_cast<long long>(copy.length)));
    }
    if (copy.pad_bytes ? copy.length % size != 0 : copy.length % kBlock != 0) {
        instruction.Fail("alignment", Format("%lld bytes are not a multiple of %lld: the rest would be cut off",
                         static_cast<long long>(copy.length), copy.pad_bytes ? static_cast<long long>(size) : 32LL));
    }
    if (reinterpret_cast<uintptr_t>(global.begin) % (copy.pad_bytes ? 1 : size) != 0) {
        instruction.Fail("alignment", "the GM address is not a multiple of the element's size");
    }
    instruction.CheckAligned(local, kBlock, "the UB tensor");
    return true;
}

void CopyIn(const char* api, Local dst, Global src, Type type, const Copy2d& copy)
{
    Instruction instruction(api, MTE2, PANGU_HERE);
    if (!CheckCopy(instruction, src, dst, type, copy)) {
        return;
    }
    int64_t size = kSize[static_cast<int>(type)];
    int64_t left = copy.left * size, right = copy.right * size;
    if (left > kBlock || right > kBlock) {
        instruction.Fail("range", "leftPadding and rightPadding are at most 32 bytes each");
    }
    if (copy.is_pad && size == 8 && copy.value != 0) {
        instruction.Fail("range", "paddingValue must be 0 for 64-bit types");
    }
    int64_t filled = (left + copy.length + right + kBlock - 1) / kBlock * kBlock;
    for (int64_t i = 0; i < copy.count; ++i) {
        int64_t to = dst.begin + i * (filled + copy.local_gap);
        const uint8_t* from = src.begin + i * (copy.length + copy.global_gap);
        instruction.Check(dst, to, to + filled, "dst");
        CheckGlobal(instruction, src, from, copy.length);
        instruction.ReadGm(from, copy.length);
        instruction.Write(to, to + filled);
    }
    instruction.Commit();
    for (int64_t i = 0; i < copy.count; ++i) {
        int64_t to = dst.begin + i * (filled + copy.local_gap);
        const uint8_t* from = src.begin + i * (copy.length + copy.global_gap);
        if (copy.is_pad) {
            for (int64_t at = 0; at < filled; at += size) {
                memcpy(instruction.Ub(to + at), &copy.value, size);
            }
        } else {
            instruction.MarkUnwritten(to, to + filled);
            memset(core->written.data() + to + left, 1, copy.length);
        }
        memcpy(instruction.Ub(to + left), from, copy.length);
    }
}

template <typename T>
static void AddElements(uint8_t* to, const uint8_t* from, int64_t bytes, T (*add)(T, T))
{
    for (int64_t i = 0; i < bytes; i += sizeof(T)) {
        T a, b;
        memcpy(&a, to + i, sizeof(T));
        memcpy(&b, from + i, sizeof(T));
        a = add(a, b);
        memcpy(to + i, &a, sizeof(T));
    }
}

void AddTo(uint8_t* to, const uint8_t* from, int64_t bytes, Type type)
{
    switch (type) {
        case Type::INT8: AddElements<int8_t>(to, from, bytes, [](int8_t a, int8_t b) { return static_cast<int8_t>(a + b); }); break;
        case Type::INT16: AddElements<int16_t>(to, from, bytes, [](int16_t a, int16_t b) { return static_cast<int16_t>(a + b); }); break;
        case Type::INT32: AddElements<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return a + b; }); break;
        case Type::FLOAT: AddElements<float>(to, from, bytes, [](float a, float b) { return a + b; }); break;
        case Type::HALF:
            AddElements<uint16_t>(to, from, bytes, [](uint16_t a, uint16_t b) {
                return HalfFromFloat(FloatFromHalf(a) + FloatFromHalf(b));
            });
            break;
        default:
            AddElements<uint16_t>(to, from, bytes, [](uint16_t a, uint16_t b) {
                return BfloatFromFloat(FloatFromBfloat(a) + FloatFromBfloat(b));
            });
    }
}

void CopyOut(const char* api, Global dst, Local src, Type type, const Copy2d& copy)
{
    Instruction instruction(api, MTE3, PANGU_HERE);
    if (!CheckCopy(instruction, dst, src, type, copy)) {
        return;
    }
    if (core->atomic_type >= 0 && core->atomic_type != static_cast<int>(type)) {
        instruction.Fail("atomic", "SetAtomicAdd was given another dtype");
    }
    int64_t filled = (copy.length + kBlock - 1) / kBlock * kBlock;
    for (int64_t i = 0; i < copy.count; ++i) {
        int64_t from = src.begin + i * (filled + copy.local_gap);
        uint8_t* to = dst.begin + i * (copy.length + copy.global_gap);
        instruction.Check(src, from, from + copy.length, "src");
        CheckGlobal(instruction, dst, to, copy.length);
        instruction.Read(from, from + copy.length);
    }
    instruction.Commit();
    for (int64_t i = 0; i < copy.count; ++i) {
        int64_t from = src.begin + i * (filled + copy.local_gap);
        uint8_t* to = dst.begin + i * (copy.length + copy.global_gap);
        instruction.WriteGm(to, copy.length, core->atomic_type);
        if (core->atomic_type >= 0) {
            AddTo(to, instruction.Ub(from), copy.length, type);
        } else {
            memcpy(to, instruction.Ub(from), copy.length);
        }
    }
}

void CopyLocal(const char* api, Local dst, Local src, Type, int64_t count, int64_t length, int64_t src_gap, int64_t dst_gap)
{
    Instruction instruction(api, V, PANGU_HERE);
    if (count == 0 || length == 0) {
        return;
    }
    if (length % kBlock != 0) {
        instruction.Fail("alignment", Format("%lld bytes are not a multiple of 32: the rest would be cut off",
                                             static_cast<long long>(length)));
    }
    instruction.CheckAligned(dst, kBlock, "dst");
    instruction.CheckAligned(src, kBlock, "src");
    for (int64_t i = 0; i < count; ++i) {
        int64_t to = dst.begin + i * (length + dst_gap), from = src.begin + i * (length + src_gap);
        instruction.Check(dst, to, to + length, "dst");
        instruction.Check(src, from, from + length, "src");
        instruction.Read(from, from + length);
        instruction.Write(to, to + length);
    }
    int64_t dst_end = dst.begin + count * (length + dst_gap) - dst_gap;
    int64_t src_end = src.begin + count * (length + src_gap) - src_gap;
    if (dst.begin < src_end && src.begin < dst_end) {
        instruction.Fail("overlap", "dst and src overlap");
    }
    instruction.Commit();
    launch->counters.vector_instructions += count * ((length + kRepeat - 1) / kRepeat);
    for (int64_t i = 0; i < count; ++i) {
        memcpy(instruction.Ub(dst.begin + i * (length + dst_gap)), instruction.Ub(src.begin + i * (length + src_gap)), length);
    }
}

void SetAtomicAdd(const char* api, int type)
{
    core->atomic_type = type;
    core->atomic_site = SiteOf(api, PANGU_HERE);
}

// ---- Scalar accesses ----------------------------------------------------------------------------------------------

void ReadLocal(const char* api, Local src, int64_t offset, uint32_t size, void* value)
{
    Instruction instruction(api, S, PANGU_HERE);
    int64_t at = src.begin + offset;
    instruction.Check(src, at, at + size, "the element");
    instruction.Read(at, at + size);
    instruction.Commit();
    memcpy(value, instruction.Ub(at), size);
}

void WriteLocal(const char* api, Local dst, int64_t offset, uint32_t size, const void* value)
{
    Instruction instruction(api, S, PANGU_HERE);
    int64_t at = dst.begin + offset;
    instruction.Check(dst, at, at + size, "the element");
    instruction.Write(at, at + size);
    instruction.Commit();
    memcpy(instruction.Ub(at), value, size);
}

static uint8_t* LineOf(const uint8_t* address)
{
    return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(address) / kCacheLine * kCacheLine);
}

void ReadGlobal(const char* api, Global src, uint64_t offset, uint32_t size, void* value)
{
    Instruction instruction(api, S, PANGU_HERE);
    const uint8_t* from = src.begin + offset;
    CheckGlobal(instruction, src, from, size);
    instruction.ReadGm(from, size);
    auto line = core->cached_lines.emplace(LineOf(from), static_cast<uint32_t>(launch->accesses.size()));
    if (!line.second && instruction.WriterOf(from) > line.first->second) {
        instruction.Fail("scalar cache", "the line was read before and then written: DataCacheCleanAndInvalid is missing");
    }
    memcpy(value, from, size);
}

// The scalar unit writes through its own cache, whole lines of 64 bytes: another core's bytes in the line are lost.
void WriteGlobal(const char* api, Global dst, uint64_t offset, uint32_t size, const void* value)
{
    Instruction instruction(api, S, PANGU_HERE);
    uint8_t* to = dst.begin + offset;
    CheckGlobal(instruction, dst, to, size);
    instruction.WriteGm(to, size, -1);
    memcpy(to, value, size);
    // What it writes its own cache holds.
    core->cached_lines[LineOf(to)] = static_cast<uint32_t>(launch->accesses.size());
    core->dirty_lines.push_back({LineOf(to), SiteOf(api, PANGU_HERE)});
}

void CleanCache(const char* api, Global dst, bool whole_cache)
{
    Instruction instruction(api, S, PANGU_HERE);
    if (!whole_cache) {
        CheckGlobal(instruction, dst, dst.begin, 1);
    }
    uint8_t* line = LineOf(dst.begin);
    if (whole_cache) {
        core->cached_lines.clear();
    } else {
        core->cached_lines.erase(line);
    }
    auto& dirty = core->dirty_lines;
    dirty.erase(std::remove_if(dirty.begin(), dirty.end(),
                               [&](const auto& entry) { return whole_cache || entry.first == line; }),
                dirty.end());
}

// ---- Launch -------------------------------------------------------------------------------------------------------

static void CheckEnd(const void* entry)
{
    const char* end = "the kernel's end";
    Idle(end, entry);
    for (int event = 0; event < kNumEvents; ++event) {
        for (int id = 0; id < kNumIds; ++id) {
            if (core->flags[event][id].set) {
                Fail(end, entry, "event flag", Format("HardEvent::%s id %d was set and not waited for: ", kEvents[event].name, id) +
                                                   Place(core->flags[event][id].site));
            }
        }
    }
    for (const MatmulObject& matmul : core->matmuls) {
        if (matmul.in_use) {
            Fail(end, entry, "Matmul", "End() is missing after " + Place(matmul.site));
        }
    }
    if (!core->dirty_lines.empty()) {
        Fail(end, entry, "scalar cache", "DataCacheCleanAndInvalid is missing after " + Place(core->dirty_lines[0].second));
    }
    if (core->atomic_type >= 0) {
        Fail(end, entry, "atomic", "SetAtomicNone is missing after " + Place(core->atomic_site));
    }
}

static uint8_t** entry_arguments = nullptr;

static void RunCore()
{
    try {
        PanguEntry(entry_arguments);
        if (core->type != kAic) {
            CheckEnd(reinterpret_cast<const void*>(&PanguEntry));
        }
    } catch (const Failure& failure) {
        launch->failed = true;
        launch->failure = failure.text;
    }
    core->finished = true;
    Core* self = core;
    swapcontext(&self->context, &launch->context);
}

static std::unique_ptr<Core> NewCore(int64_t index, int64_t block, int64_t sub, int type)
{
    auto made = std::make_unique<Core>();
    made->index = index;
    made->block = block;
    made->sub = sub;
    made->type = type;
    if (type != kAic) {
        made->ub.assign(kUbBytes, kPoison);
        made->written.assign(kUbBytes, 0);
        made->blocks.resize(kUbBytes / kBlock);
        made->stamps.assign(kUbBytes / kBlock, 0);
    }
    made->stack.resize(1 << 20);
    getcontext(&made->context);
    made->context.uc_stack.ss_sp = made->stack.data();
    made->context.uc_stack.ss_size = made->stack.size();
    made->context.uc_link = nullptr;
    makecontext(&made->context, RunCore, 0);
    return made;
}

static void Resume(Core* next)
{
    core = next;
    g_coreType = next->type;
    swapcontext(&launch->context, &next->context);
    launch->counters.ub_bytes_used = std::max(launch->counters.ub_bytes_used, next->ub_peak);
    core = nullptr;
    if (launch->failed) {
        throw Failure{launch->failure};
    }
}

static void RunCores()
{
    if (launch->mixed) {
        // Cube cores run up to REGIST_MATMUL_OBJ, where they serve the vector cores.
        for (int64_t block = 0; block < launch->num_blocks; ++block) {
            auto cube = NewCore(block, block, 0, kAic);
            Resume(cube.get());
        }
    }
    int64_t num_cores = launch->num_blocks * launch->instances;
    std::vector<std::unique_ptr<Core>>& cores = launch->cores;
    cores.resize(num_cores);
    for (;;) {
        int64_t waiting = -1, ended = -1;
        for (int64_t i = 0; i < num_cores; ++i) {
            if (launch->epoch == 1) {
                cores[i] = NewCore(i, i / launch->instances, i % launch->instances, kIs910b ? kAiv : 0);
            }
            cores[i]->at_sync = false;
            Resume(cores[i].get());
            if (cores[i]->finished) {
                ended = i;
                // Only a SyncAll keeps a core's state.
                cores[i].reset();
            } else {
                waiting = i;
            }
            if (waiting >= 0 && ended >= 0) {
                throw Failure{Format("SyncAll: %s, core %d waits in SyncAll, core %d ended without one: the launch would hang",
                                     launch->kernel.c_str(), static_cast<int>(waiting), static_cast<int>(ended))};
            }
        }
        if (waiting < 0) {
            return;
        }
        ++launch->epoch;
    }
}

static GmBuffer NewGm(const std::string& name, const uint8_t* initial, int64_t bytes, bool writable)
{
    GmBuffer made;
    made.name = name;
    made.bytes = bytes;
    made.writable = writable;
    made.initialised = initial != nullptr;
    int64_t whole = (bytes + 511) / 512 * 512 + 2 * kGuard;
    made.storage = static_cast<uint8_t*>(aligned_alloc(512, whole));
    memset(made.storage, kPoison, whole);
    made.data = made.storage + kGuard;
    if (initial != nullptr) {
        memcpy(made.data, initial, bytes);
    } else {
        made.written = static_cast<uint8_t*>(calloc(bytes + 1, 1));
    }
    made.writer = static_cast<uint32_t*>(calloc(bytes / 2 + 1, 4));
    made.reader = static_cast<uint32_t*>(calloc(bytes / 2 + 1, 4));
    made.other_reader = static_cast<uint32_t*>(calloc(bytes / 2 + 1, 4));
    return made;
}

static void FreeGm(GmBuffer& buffer)
{
    free(buffer.storage);
    free(buffer.written);
    free(buffer.writer);
    free(buffer.reader);
    free(buffer.other_reader);
}

static void CheckGuards(const GmBuffer& buffer)
{
    int64_t whole = (buffer.bytes + 511) / 512 * 512 + 2 * kGuard;
    for (int64_t i = 0; i < whole; ++i) {
        if ((i < kGuard || i >= kGuard + buffer.bytes) && buffer.storage[i] != kPoison) {
            throw Failure{Format("out of bounds: %s, byte %lld of %s was written past the API", launch->kernel.c_str(),
                                 static_cast<long long>(i - kGuard), buffer.name.c_str())};
        }
    }
}
}  // namespace pangu

struct PanguLaunch {
    const char* kernel;
    int64_t num_blocks, instances, mixed, has_sync_hardware;
    int64_t num_buffers;
    uint8_t** data;
    const char** names;
    const int64_t* bytes;
    const int64_t* kinds;  // 0 input, 1 output, 2 in place
    int64_t num_arguments;
    const int64_t* arguments;  // buffer of each, -1 absent
    const uint8_t* tiling;
    int64_t tiling_bytes;
    uint64_t tiling_key;
    int64_t workspace_bytes, removed_sync, allow_unwritten;
};

extern "C" __attribute__((visibility("default"))) int pangu_launch(const PanguLaunch* request,
                                                                 pangu::Counters* counters, char* message,
                                                                 int64_t message_bytes)
{
    using namespace pangu;
    Launch state;
    launch = &state;
    state.kernel = request->kernel;
    state.num_blocks = request->num_blocks;
    state.instances = request->instances;
    state.mixed = request->mixed != 0;
    state.has_sync_hardware = request->has_sync_hardware != 0;
    state.removed_sync = static_cast<int>(request->removed_sync);
    state.cube_service.resize(request->num_blocks);
    g_tilingKey = request->tiling_key;
    int status = 0;
    try {
        if (request->num_arguments + 2 != PanguNumArguments()) {
            throw Failure{Format("arguments: %s takes %d besides workspace and tiling, the launch got %d", request->kernel,
                                 PanguNumArguments() - 2, static_cast<int>(request->num_arguments))};
        }
        for (int64_t i = 0; i < request->num_buffers; ++i) {
            state.gm.push_back(NewGm(request->names[i], request->kinds[i] == 1 ? nullptr : request->data[i],
                                     request->bytes[i], request->kinds[i] != 0));
        }
        std::vector<uint8_t*> arguments;
        for (int64_t i = 0; i < request->num_arguments; ++i) {
            arguments.push_back(request->arguments[i] < 0 ? nullptr : state.gm[request->arguments[i]].data);
        }
        if (request->workspace_bytes > 0) {
            // On 910B the library owns the first 16 MB: nothing may touch them, so they are not allocated.
            int64_t system = kIs910b ? kSystemWorkspace : 0;
            if (request->workspace_bytes < system) {
                throw Failure{Format("workspace: %s, %lld bytes are less than the library's 16 MB", request->kernel,
                                     static_cast<long long>(request->workspace_bytes))};
            }
            state.gm.push_back(NewGm("the workspace", nullptr, request->workspace_bytes - system, true));
            state.gm.back().is_workspace = true;
            state.user_workspace = state.gm.back().data;
            state.workspace = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(state.user_workspace) - system);
        }
        std::vector<uint64_t> tiling((request->tiling_bytes + 7) / 8);
        memcpy(tiling.data(), request->tiling, request->tiling_bytes);
        state.tiling = reinterpret_cast<uint8_t*>(tiling.data());
        state.tiling_bytes = request->tiling_bytes;
        arguments.push_back(state.workspace);
        arguments.push_back(const_cast<uint8_t*>(state.tiling));
        entry_arguments = arguments.data();
        RunCores();
        for (int64_t i = 0; i < static_cast<int64_t>(state.gm.size()); ++i) {
            GmBuffer& buffer = state.gm[i];
            CheckGuards(buffer);
            if (i >= request->num_buffers || !buffer.writable) {
                continue;
            }
            const void* open = buffer.written == nullptr || request->allow_unwritten != 0
                                   ? nullptr
                                   : memchr(buffer.written, 0, buffer.bytes);
            if (open != nullptr) {
                throw Failure{Format("unwritten output: %s, byte %lld of %s", request->kernel,
                                     static_cast<long long>(static_cast<const uint8_t*>(open) - buffer.written),
                                     buffer.name.c_str())};
            }
            memcpy(request->data[i], buffer.data, buffer.bytes);
        }
    } catch (const Failure& failure) {
        snprintf(message, message_bytes, "%s", failure.text.c_str());
        status = 1;
    }
    for (GmBuffer& buffer : state.gm) {
        FreeGm(buffer);
    }
    *counters = state.counters;
    launch = nullptr;
    core = nullptr;
    return status;
}
