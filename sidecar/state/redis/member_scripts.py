"""The Lua scripts for members and leases. Times are in µs of Redis' clock, which a Lua double holds exactly.

A generation is one run of one process as a primary, identified by its `run_id` and `master_replid`. The first script in
a new generation records it: leases of earlier generations no longer count as certain, and every member gets the time of
a beat before it counts as dead. `tests/worlds/ownership/redis.py` is a model of these scripts and explains the reasons;
tests run both side by side.
"""

from __future__ import annotations

from sidecar.state.redis.scripts import Script

_KEYS = ("meta", "ownership", "members", "applied", "beats", "leases", "access-applied")

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
  redis.call('HDEL', KEYS[7], member)
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
"""Record a member's beat, info and last change read; remove leases that were released long ago.

Removal keeps the list short: backends come and go, and pods' names are never reused. It is safe, because epochs start
from this clock's milliseconds: the backend's next epoch will exceed the removed one.

Return [generation, now, µs until backends without a lease may be acquired, live members, leases of this generation, the
last change of the registry, its incarnation or ""]. A member is [id, info, last change read].
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
"""Remove a member at once and release all its leases, so that nobody waits for one whose release got lost."""

LIVE = Script(
    ("members", "beats"),
    """
local now, found = redis.call('TIME'), {}
local since = string.format('(%.0f', tonumber(now[1]) * 1000000 + tonumber(now[2]) - tonumber(ARGV[1]))
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], since, '+inf')) do
  found[#found + 1] = redis.call('HGET', KEYS[1], member) or ''
end
return found
""",
)
"""Return what the live members have told of themselves. It changes nothing."""

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
"""Acquire a lease if that is safe; return [1 if granted else 0, epoch, holder or "", generation, now]."""

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
"""Renew the lease that this token holds, unless a later number did; return the same as ACQUIRE."""

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
"""Release a lease; its epoch stays."""
