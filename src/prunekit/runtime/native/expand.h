/* The kernel that writes rows out dense, included for every instruction set and size of values. Defined by whoever includes it: NAME,
   TARGET, VALUE, LANES, and PLACE(out, values, bits), which writes LANES entries. */

TARGET static void NAME(const Matrix *matrix, int64_t begin, int64_t end, void *out)
{
    const int64_t words = matrix->words, columns = matrix->columns;
    for (int64_t row = begin; row < end; row++) {
        const VALUE *values = (const VALUE *)matrix->values + matrix->offsets[row];
        const unsigned char *mask = matrix->mask + 8 * row * words;
        VALUE *line = (VALUE *)out + (row - begin) * columns;
        for (int64_t word = 0; word < words; word++) {
            const uint64_t bits = word_at(mask, word);
            const int64_t left = columns - word * WORD;
            VALUE last[WORD];
            VALUE *entries = left < WORD ? last : line + word * WORD;
#pragma GCC unroll 16
            for (int part = 0; part < WORD / LANES; part++) {
                const uint64_t some = bits >> (part * LANES) & (UINT64_MAX >> (WORD - LANES));
                PLACE(entries + part * LANES, values, some);
                values += __builtin_popcountll(some);
            }
            if (left < WORD)
                memcpy(line + word * WORD, last, left * sizeof(VALUE));
        }
    }
}

#undef NAME
#undef VALUE
#undef LANES
#undef PLACE
