-- include: base

-- Indexes that no step reads again once it has changed them. Where several jobs move in one step, what they change there
-- is kept in `later`, and made with one command for each key by `write_indexes`; of two changes of a member the later one
-- holds.
local later
local PARTS = 2000

local function gather_indexes()
  later = {zsets = {}, counts = {}, fields = {}}
end

local function later_of(kind, key)
  local of_key = later[kind][key]
  if not of_key then
    of_key = {}
    later[kind][key] = of_key
  end
  return of_key
end

local function list(key, score, member)
  if later then
    later_of('zsets', key)[member] = score
  else
    redis.call('ZADD', key, score, member)
  end
end

local function unlist(key, member)
  if later then
    later_of('zsets', key)[member] = false
  else
    redis.call('ZREM', key, member)
  end
end

local function count(key, field, by)
  if later then
    local counts = later_of('counts', key)
    counts[field] = (counts[field] or 0) + by
  elseif redis.call('HINCRBY', key, field, by) <= 0 then
    redis.call('HDEL', key, field)
  end
end

local function unset(key, field)
  if later then
    local fields = later_of('fields', key)
    fields[#fields + 1] = field
  else
    redis.call('HDEL', key, field)
  end
end

-- Calls a command with a long list of arguments, in parts that fit on Lua's stack.
local function in_parts(command, key, arguments)
  for i = 1, #arguments, PARTS do
    redis.call(command, key, unpack(arguments, i, math.min(i + PARTS - 1, #arguments)))
  end
end

local function write_indexes()
  local all = later
  later = nil
  for key, members in pairs(all.zsets) do
    local gone, there = {}, {}
    for member, score in pairs(members) do
      if score then
        there[#there + 1] = score
        there[#there + 1] = member
      else
        gone[#gone + 1] = member
      end
    end
    in_parts('ZREM', key, gone)
    in_parts('ZADD', key, there)
  end
  for key, fields in pairs(all.fields) do
    in_parts('HDEL', key, fields)
  end
  for key, fields in pairs(all.counts) do
    for field, by in pairs(fields) do
      if by ~= 0 then
        count(key, field, by)
      end
    end
  end
end
