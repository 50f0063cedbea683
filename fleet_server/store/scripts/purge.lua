#!lua flags=allow-oom
-- KEYS: events (for routing). ARGV: limit, keep_ms, keep_count, keep_dead -> how many ended jobs were forgotten
-- include: ends

return purge(tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]))
