"""Members and leases inside Redis; times are in µs of its clock, which a double of Lua holds exactly.

A generation is one life of one process as a primary, known by its `run_id` and `master_replid`. The first script that
finds itself in another one than is written down begins it: leases of earlier ones are then not known to be true, and
nobody is taken for dead before having had the time to beat. `tests/worlds/ownership/redis.py` is the same as a model and
says why; the tests run both side by side.
"""

from __future__ import annotations

from sidecar.state.redis.scripts import Script

_KEYS = ("meta", "ownership", "members", "applied", "beats", "leases")

_COMMON = """
local META, OWNERSHIP, MEMBERS, APPLIED, BEATS, LEASES = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local function digits(number) return string.format('%.0f', number) end

local function now_us()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000000 + tonumber(now[2])
end

local function process()
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  return run .. string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
end

local now, generation = now_us(), process()
local known = redis.call('HMGET', OWNERSHIP, 'generation', 'born')
local born = tonumber(known[2] or '0')
if known[1] ~= generation then
  born = now
  redis.call('HSET', OWNERSHIP, 'generation', generation, 'born', digits(born))
  for _, member in ipairs(redis.call('ZRANGE', BEATS, 0, -1)) do redis.call('ZADD', BEATS, digits(now), member) end
end

local function forget(member)
  redis.call('HDEL', MEMBERS, member)
  redis.call('HDEL', APPLIED, member)
  redis.call('ZREM', BEATS, member)
end

local function lease(backend)
  local text = redis.call('HGET', LEASES, backend)
  return text and cjson.decode(text) or nil
end

local function keep(backend, record) redis.call('HSET', LEASES, backend, cjson.encode(record)) end

local function is_current(record) return record and record.generation == generation end

local function answer(granted, epoch, holder)
  return {granted and 1 or 0, digits(epoch), holder, generation, digits(now)}
end

local function refused(record)
  local holder = is_current(record) and not record.released and record.holder or ''
  return answer(false, record and tonumber(record.epoch) or 0, holder)
end
"""

BEAT = Script(
    _KEYS,
    _COMMON
    + """
local member, told, applied, ttl, grace = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local kept = tonumber(ARGV[6])
redis.call('HSET', MEMBERS, member, told)
redis.call('HSET', APPLIED, member, applied)
redis.call('ZADD', BEATS, digits(now), member)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', BEATS, '-inf', digits(now - ttl))) do forget(gone) end
local members, leases = {}, {}
for _, name in ipairs(redis.call('ZRANGE', BEATS, 0, -1)) do
  members[#members + 1] = {name, redis.call('HGET', MEMBERS, name) or '', redis.call('HGET', APPLIED, name) or '0'}
end
local held = redis.call('HGETALL', LEASES)
for index = 1, #held, 2 do
  local record = cjson.decode(held[index + 1])
  if record.released and now - tonumber(record.renewed) > kept then
    redis.call('HDEL', LEASES, held[index])
  elseif is_current(record) then
    leases[#leases + 1] = {held[index], held[index + 1]}
  end
end
local state = redis.call('HMGET', META, 'revision', 'incarnation')
return {generation, digits(now), digits(born + grace - now), members, leases, state[1] or '0', state[2] or ''}
""",
)
"""Say that a member lives, what it is and what it has read; forget leases that were given back long ago.

Backends come and go, and names of pods are never used again. An epoch that is forgotten was of this clock's
milliseconds, and so will be the next one of that backend.

Return [generation, now, when backends without a lease may be had, live members, leases of this generation, the last
change of the registry, its incarnation or ""]. A member is [id, what it told, what it has read].
"""

LEAVE = Script(
    _KEYS,
    _COMMON
    + """
forget(ARGV[1])
local held = redis.call('HGETALL', LEASES)
for index = 1, #held, 2 do
  local record = cjson.decode(held[index + 1])
  if record.holder == ARGV[1] then
    record.released = true
    keep(held[index], record)
  end
end
return 1
""",
)
"""Take a member off at once, and give back all its leases: one whose release got lost would be waited for."""

LAGGING = Script(
    ("applied", "beats"),
    """
local number, ttl, besides = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local now, found = redis.call('TIME'), {}
local since = string.format('(%.0f', tonumber(now[1]) * 1000000 + tonumber(now[2]) - ttl)
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], since, '+inf')) do
  local applied = tonumber(redis.call('HGET', KEYS[1], member) or '0')
  if member ~= besides and applied < number then found[#found + 1] = member end
end
return found
""",
)
"""Return the live members that have not read a change yet."""

ACQUIRE = Script(
    _KEYS,
    _COMMON
    + """
local backend, token, least, witnesses, agreed = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], cjson.decode(ARGV[5])
local holds, wanted, by, holder, name = ARGV[6] == '1', ARGV[7], tonumber(ARGV[8]), ARGV[9], ARGV[10]
local number, ttl, grace = ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13])
local record = lease(backend)
if is_current(record) and record.token == token and not record.released then
  return answer(true, tonumber(record.epoch), holder)
end

local function has_agreed(member)
  for _, one in ipairs(agreed) do
    if one == member then return true end
  end
  return false
end

local function is_granted()
  if wanted ~= generation or now > by then return false end
  if not is_current(record) then return holds or born + grace - now <= 0 end
  if record.released then return record.token ~= token end
  local renewed = tonumber(record.renewed)
  if now < renewed + ttl then return false end
  if has_agreed(record.holder) then return true end
  for _, witness in ipairs(cjson.decode(record.witnesses)) do
    if has_agreed(witness) then return true end
  end
  return now >= renewed + grace
end

if not is_granted() then return refused(record) end
local stored = record and tonumber(record.epoch) or 0
if not is_current(record) then stored = math.max(stored, math.floor(now / 1000)) end
local epoch = math.max(stored, least) + 1
keep(backend, {holder = holder, name = name, token = token, epoch = digits(epoch), generation = generation,
  renewed = digits(now), number = number, witnesses = witnesses, released = false})
return answer(true, epoch, holder)
""",
)
"""Take a lease where that is safe; return [whether, epoch, holder or "", generation, now]."""

RENEW = Script(
    _KEYS,
    _COMMON
    + """
local backend, token, number, witnesses = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local record = lease(backend)
if not is_current(record) or record.token ~= token or record.released then return refused(record) end
if tonumber(number) > tonumber(record.number) then
  record.number, record.witnesses, record.renewed = number, witnesses, digits(now)
  keep(backend, record)
end
return answer(true, tonumber(record.epoch), record.holder)
""",
)
"""Prolong a lease that this token holds, unless a later number did; return as ACQUIRE does."""

RELEASE = Script(
    _KEYS,
    _COMMON
    + """
local record = lease(ARGV[1])
if record and record.token == ARGV[2] then
  record.released = true
  keep(ARGV[1], record)
end
return 1
""",
)
"""Give a lease back; its epoch stays."""
