#!lua
-- KEYS: output. ARGV: filename, job, created_ms, size, record -> 1
-- include: outputs

put_output(ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
return 1
