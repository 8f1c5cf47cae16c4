// All ops for the instructions that the including file has switched on, inside its namespace. What the standard library
// brings is included before, so that none of it is compiled for them: another file may end up with that code.

#include "lanes.h"

#include "elementary.h"
#include "rows.h"
#include "blocks.h"
#if defined(WITH_AMX)
#include "tiles.h"
#elif defined(WITH_DOTS)
#include "dots.h"
#endif
#include "product.h"

#include "attend_pages.h"
#include "attend_rows.h"
#include "attend_tile.h"
#include "attend.h"
#include "draw.h"
#include "embed.h"
#include "heads.h"
#include "truncation.h"

#include "sample.h"
