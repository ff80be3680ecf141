"""What happens inside Redis. A script is one step: nothing comes between its commands, and all keys are in one slot.

`changes` is a stream whose ids are the changes' numbers. Each of its entries says which number came before it (`prev`),
so a reader sees a gap, and has a `mark` of its own: a replica that finds another mark, or none, at the number that it
read last knows that this Redis has lost writes and perhaps taken others since, as after a failover. It is asked before
every write, so nothing is written on top of a loss before somebody has put back what was lost.

The clock is Redis' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1


@dataclass(frozen=True)
class Script:
    """A script's text and the keys it is given, in order."""

    keys: tuple[str, ...]
    text: str

    @property
    def digest(self) -> str:
        """The name under which Redis keeps it."""
        return sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_STATE = ("meta", "adapters", "changes", "tombstones")

_COMMON = """
local META, ADAPTERS, CHANGES, TOMBSTONES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local function digits(number) return string.format('%.0f', number) end

local function now_ms()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end

local function place(found)
  if #found == 0 then return 0, '' end
  local mark = ''
  for index = 1, #found[1][2], 2 do
    if found[1][2][index] == 'mark' then mark = found[1][2][index + 1] end
  end
  return tonumber(string.match(found[1][1], '^%d+')), mark
end

local function last() return place(redis.call('XREVRANGE', CHANGES, '+', '-', 'COUNT', 1)) end

local function counter() return tonumber(redis.call('HGET', META, 'revision') or '0') end

local function damaged()
  return tonumber(redis.call('HGET', META, 'entries') or '0') ~= redis.call('HLEN', ADAPTERS)
end

local function lost(incarnation, applied, mark)
  if redis.call('HGET', META, 'incarnation') ~= incarnation or counter() < applied or damaged() then return true end
  if applied == 0 then return false end
  local number, held = place(redis.call('XRANGE', CHANGES, digits(applied), digits(applied)))
  if number == applied then return held ~= mark end
  local first = place(redis.call('XRANGE', CHANGES, '-', '+', 'COUNT', 1))
  return first < applied
end

local function head(value)
  local revision, token, number, time, from = string.match(value, '^(%d+):(%w+):(%d+):(%d+):()')
  return tonumber(revision), token, tonumber(number), tonumber(time), string.sub(value, from)
end

local function announce(number, before, mark, changes_max, name, value)
  redis.call('XADD', CHANGES, 'MAXLEN', changes_max, digits(number) .. '-0', 'prev', digits(before), 'mark', mark,
    'name', name, 'value', value)
  redis.call('HSET', META, 'revision', digits(number), 'entries', redis.call('HLEN', ADAPTERS))
end

local function forget(names)
  for _, name in ipairs(names) do
    redis.call('HDEL', ADAPTERS, name)
    redis.call('ZREM', TOMBSTONES, name)
  end
end

local function bury(name, time, keep_ms, keep_max)
  redis.call('ZADD', TOMBSTONES, time, name)
  forget(redis.call('ZRANGEBYSCORE', TOMBSTONES, '-inf', now_ms() - keep_ms, 'LIMIT', 0, 100))
  local excess = redis.call('ZCARD', TOMBSTONES) - keep_max
  if excess > 0 then forget(redis.call('ZRANGE', TOMBSTONES, 0, math.min(excess, 100) - 1)) end
end
"""

LOOK = Script(
    _STATE,
    _COMMON
    + """
local schema, fresh, incarnation, applied, mark = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local found = redis.call('HGET', META, 'schema')
if found and found ~= schema then return {found} end
if not found or damaged() then
  local number = last()
  redis.call('HSET', META, 'schema', schema, 'incarnation', fresh, 'revision', digits(math.max(number, counter())),
    'entries', redis.call('HLEN', ADAPTERS))
end
local number, newest = last()
return {schema, redis.call('HGET', META, 'incarnation'), digits(counter()), digits(number), newest,
  lost(incarnation, applied, mark) and 1 or 0}
""",
)
"""Return [schema, incarnation, revision, the last change's number and its mark, whether what was read is lost].

Creates the state where there is none. Where entries are missing it gives a new incarnation, so that every replica, not
only the one that noticed, puts back what it has. Of another schema only that is returned, and nothing is touched.
"""

WRITE = Script(
    _STATE,
    _COMMON
    + """
local incarnation, applied, mark, name, expected = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local token, record = ARGV[6], ARGV[7]
local changes_max, keep_ms, keep_max = ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
if lost(incarnation, applied, mark) then return {'lost', '0'} end
local live, held = 0, redis.call('HGET', ADAPTERS, name)
if held then
  local revision, by, number, _, text = head(held)
  if by == token then return {'written', digits(number)} end
  if text ~= '' then live = revision end
end
local before = counter()
if live ~= expected then return {'conflict', digits(before)} end
local number, time = before + 1, digits(now_ms())
local value = digits(number) .. ':' .. token .. ':' .. digits(number) .. ':' .. time .. ':' .. record
redis.call('HSET', ADAPTERS, name, value)
if record == '' then bury(name, time, keep_ms, keep_max) else redis.call('ZREM', TOMBSTONES, name) end
announce(number, before, token, changes_max, name, value)
return {'written', digits(number)}
""",
)
"""Write a record, or nothing to forget a name, where the live record's revision is the expected one (0: none).

Return [what came of it, a number]: "written" with the change's number; "conflict" with the last change's; "lost" when
this Redis has not what the writer has read.
"""

RESTORE = Script(
    _STATE,
    _COMMON
    + """
local incarnation, applied, mark = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local changes_max, keep_ms, keep_max = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
if redis.call('HGET', META, 'incarnation') ~= incarnation then return 0 end
local newest = last()
if counter() < applied or newest ~= counter() then
  announce(math.max(counter(), applied, newest) + 1, counter(), mark .. '0', changes_max, '', '')
end
for index = 7, #ARGV, 2 do
  local name, value = ARGV[index], ARGV[index + 1]
  local revision, token, _, time, record = head(value)
  local held = redis.call('HGET', ADAPTERS, name)
  local held_revision, held_token = 0, ''
  if held then held_revision, held_token = head(held) end
  if revision > held_revision or (revision == held_revision and token > held_token) then
    local before = counter()
    local number = math.max(before, revision) + 1
    value = digits(revision) .. ':' .. token .. ':' .. digits(number) .. ':' .. digits(time) .. ':' .. record
    redis.call('HSET', ADAPTERS, name, value)
    if record == '' then bury(name, time, keep_ms, keep_max) else redis.call('ZREM', TOMBSTONES, name) end
    announce(number, before, mark .. digits(index), changes_max, name, value)
  end
end
return 1
""",
)
"""Put back entries that are newer than what is there, and announce them under new numbers; names and values in turn.

Before them the numbers are brought past what the replica has read, so none is given twice. Return 1, or 0 when the
incarnation is another one by now.
"""

_MEMBERS = ("meta", "members", "applied", "beats", "leases")

_NOW = """
local function now_ms()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end
"""

BEAT = Script(
    _MEMBERS,
    _NOW
    + """
local META, MEMBERS, APPLIED, BEATS, LEASES = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local member, info, applied, ttl_ms, forget_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()
redis.call('HSET', MEMBERS, member, info)
redis.call('HSET', APPLIED, member, applied)
redis.call('ZADD', BEATS, now, member)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', BEATS, '-inf', now - forget_ms, 'LIMIT', 0, 100)) do
  redis.call('HDEL', MEMBERS, gone)
  redis.call('HDEL', APPLIED, gone)
  redis.call('ZREM', BEATS, gone)
end
local members = {}
local live = redis.call('ZRANGEBYSCORE', BEATS, '(' .. string.format('%.0f', now - ttl_ms), '+inf', 'WITHSCORES')
for index = 1, #live, 2 do
  local name = live[index]
  members[#members + 1] = {name, redis.call('HGET', MEMBERS, name) or '', redis.call('HGET', APPLIED, name) or '0',
    string.format('%.0f', now - tonumber(live[index + 1]))}
end
local known = redis.call('HMGET', META, 'revision', 'incarnation')
return {string.format('%.0f', now), known[1] or '0', known[2] or '', members, redis.call('HGETALL', LEASES)}
""",
)
"""Say that a member lives, what it is and what it has read; return [now, revision, incarnation, live members, leases].

A member is [name, info, applied, milliseconds since its beat]; leases are backends and values in turn.
"""

LAGGING = Script(
    ("applied", "beats"),
    _NOW
    + """
local number, ttl_ms, besides = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local found = {}
local since = '(' .. string.format('%.0f', now_ms() - ttl_ms)
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], since, '+inf')) do
  local applied = tonumber(redis.call('HGET', KEYS[1], member) or '0')
  if member ~= besides and applied < number then found[#found + 1] = member end
end
return found
""",
)
"""Return the live members that have not read a change yet."""

_LEASE = (
    _NOW
    + """
local function read(backend)
  local value = redis.call('HGET', KEYS[1], backend)
  if not value then return 0, '', 0, '' end
  local epoch, token, ends, member = string.match(value, '^(%d+):(%w*):(%d+):(.*)$')
  return tonumber(epoch), token, tonumber(ends), member
end

local function write(backend, epoch, token, ends, member)
  local value = string.format('%.0f', epoch) .. ':' .. token .. ':' .. string.format('%.0f', ends) .. ':' .. member
  redis.call('HSET', KEYS[1], backend, value)
  return value
end
"""
)

ACQUIRE = Script(
    ("leases",),
    _LEASE
    + """
local backend, member, token, ttl_ms, least = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()
local epoch, holder, ends, name = read(backend)
if holder ~= token and ends > now then
  return {0, redis.call('HGET', KEYS[1], backend), string.format('%.0f', now)}
end
if holder ~= token or epoch < least then epoch = math.max(epoch, least) + 1 end
return {1, write(backend, epoch, token, now + ttl_ms, member), string.format('%.0f', now)}
""",
)
"""Take a lease that nobody holds, or that this token holds already; return [whether, the lease as it is now, now].

The epoch rises with each new holder, and past the least one that is asked for.
"""

RENEW = Script(
    ("leases",),
    _LEASE
    + """
local backend, token, ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = now_ms()
local epoch, holder, ends, member = read(backend)
local held = redis.call('HGET', KEYS[1], backend) or '0::0:'
if holder ~= token or ends <= now then return {0, held, string.format('%.0f', now)} end
return {1, write(backend, epoch, token, now + ttl_ms, member), string.format('%.0f', now)}
""",
)
"""Prolong a lease that this token holds and that has not ended; return [whether, the lease as it is now, now]."""

RELEASE = Script(
    ("leases",),
    _LEASE
    + """
local epoch, holder = read(ARGV[1])
if holder ~= ARGV[2] then return 0 end
write(ARGV[1], epoch, '', 0, '')
return 1
""",
)
"""Give a lease back and keep its epoch; return whether this token held it."""
