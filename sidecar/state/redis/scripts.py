"""The registry's Lua scripts. Redis runs a script atomically, and all keys are in one slot.

`changes` is a stream whose ids are the changes' numbers. Each entry has its own `mark` and carries the number and mark
of the preceding entry, so a reader detects a gap. A replica that finds another mark, or none, at the number that it
read last knows that this Redis lost writes and may have taken others since, as after a failover. Every write checks
this first: nothing is written on top of a loss before a replica has restored the lost entries.

A process that finds the state written by another process, as after a failover, lets the numbers leap. Its writes are
therefore newer than all that the former process took and lost; only replicas that have read those were told of them.

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
        """The SHA-1 under which Redis caches the script."""
        return sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_STATE = ("meta", "adapters", "changes", "tombstones")

_COMMON = """
local LEAP = 100000

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

local function settle()
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  local process = run .. string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
  local found = redis.call('HGET', META, 'process')
  if found == process then return end
  redis.call('HSET', META, 'process', process)
  if found then redis.call('HSET', META, 'least', digits(counter() + LEAP)) end
end

local function following(number)
  return math.max(number + 1, tonumber(redis.call('HGET', META, 'least') or '0'))
end

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
  if not revision then return 0, '', 0, 0, '' end
  return tonumber(revision), token, tonumber(number), tonumber(time), string.sub(value, from)
end

local function announce(number, before, mark, changes_max, name, value)
  local _, after = last()
  redis.call('XADD', CHANGES, 'MAXLEN', changes_max, digits(number) .. '-0', 'before', digits(before), 'after', after,
    'mark', mark, 'name', name, 'value', value)
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
settle()
local number, newest = last()
return {schema, redis.call('HGET', META, 'incarnation'), digits(counter()), digits(number), newest,
  lost(incarnation, applied, mark) and 1 or 0}
""",
)
"""Return [schema, incarnation, revision, the last change's number and mark, 1 if data that was read is lost else 0].

Creates the state if there is none. If entries are missing, it sets a new incarnation, so that every replica, not only
the one that noticed, restores what it has. For another schema it returns only the schema and changes nothing.
"""

WRITE = Script(
    _STATE,
    _COMMON
    + """
local incarnation, applied, mark, name, expected = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local token, record = ARGV[6], ARGV[7]
local changes_max, keep_ms, keep_max = ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
settle()
if lost(incarnation, applied, mark) then return {'lost', '0'} end
local live, held = 0, redis.call('HGET', ADAPTERS, name)
if held then
  local revision, by, number, _, text = head(held)
  if by == token then return {'written', digits(number)} end
  if text ~= '' then live = revision end
end
local before = counter()
if live ~= expected then return {'conflict', digits(before)} end
local number, time = following(before), digits(now_ms())
local value = digits(number) .. ':' .. token .. ':' .. digits(number) .. ':' .. time .. ':' .. record
redis.call('HSET', ADAPTERS, name, value)
if record == '' then bury(name, time, keep_ms, keep_max) else redis.call('ZREM', TOMBSTONES, name) end
announce(number, before, token, changes_max, name, value)
return {'written', digits(number)}
""",
)
"""Write a record (empty: forget the name) if the live record's revision is the expected one (0: no record).

Return [result, number]: "written" with the change's number; "conflict" with the last change's; "lost" if this Redis
lacks data that the writer has read.
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
  announce(math.max(counter(), applied, newest) + LEAP, counter(), mark .. '0', changes_max, '', '')
end
for index = 7, #ARGV, 2 do
  local name, value = ARGV[index], ARGV[index + 1]
  local revision, token, _, time, record = head(value)
  local held = redis.call('HGET', ADAPTERS, name)
  local held_revision, held_token = 0, ''
  if held then held_revision, held_token = head(held) end
  if revision > held_revision or (revision == held_revision and token > held_token) then
    local before = counter()
    local number = following(math.max(before, revision))
    value = digits(revision) .. ':' .. token .. ':' .. digits(number) .. ':' .. digits(time) .. ':' .. record
    redis.call('HSET', ADAPTERS, name, value)
    if record == '' then bury(name, time, keep_ms, keep_max) else redis.call('ZREM', TOMBSTONES, name) end
    announce(number, before, mark .. digits(index), changes_max, name, value)
  end
end
return 1
""",
)
"""Restore entries that are newer than those in Redis, and announce them under new numbers.

The arguments alternate names and values. The numbers first leap past those that any replica may have read, so none is
used twice. Return 1, or 0 if the incarnation has changed.
"""
