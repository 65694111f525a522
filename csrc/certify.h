/* Few queries over a long cache whose pages have codes: a part of the numbers is read, and what the others
 * may change is bounded. */
#ifndef ADA_CERTIFY_H
#define ADA_CERTIFY_H

#include "attend.h"

/* Tighter tolerances, shorter caches and more queries read all there is. */
#define ADA_CERTIFIED_LEAST 8e-3
#define ADA_CERTIFIED_KEYS 2048
#define ADA_CERTIFIED_QUERIES 16
#define ADA_CERTIFIED_ROWS 32 /* queries that share a key head */

bool ada_may_certify(const ada_problem *p, const ada_budget *budget);
/* ada_attend of such a problem. What cannot be bounded is computed as without codes. */
ada_status ada_certify(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *), void *context,
                       ada_error *error);

#endif
