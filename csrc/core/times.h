// Arithmetic of times: int64 counts of a unit since 1970-01-01 00:00:00 UTC, in the proleptic Gregorian calendar.
//
// No intermediate result overflows, for any time and unit.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace recis {

// In the order of PARTS in recis_hybrid/features/ops/times.py.
enum class TimePart : int64_t {
  kSecond = 0,
  kMinute,
  kHour,
  kDayOfWeek,  // Monday is 0
  kIsWeekend,
  kDayOfMonth,
  kDayOfYear,
  kMonth,
  kYear,
};

// x / by, rounded toward minus infinity.
RECIS_HD int64_t floor_div(int64_t x, int64_t by) {
  const int64_t quotient = x / by;
  return quotient - (x % by < 0 ? 1 : 0);
}

RECIS_HD int64_t floor_mod(int64_t x, int64_t by) {
  const int64_t rest = x % by;
  return rest < 0 ? rest + by : rest;
}

inline constexpr int64_t kDaySeconds = 86400;
inline constexpr int64_t kCycleDays = 146097;   // in 400 years, after which weekdays repeat, too
inline constexpr int64_t kCycleShift = 719468;  // days from 0000-03-01 to 1970-01-01

// A part of a time, such as its hour. A unit is 1 / per_second of a second, or a day where per_second is 0. Local time
// is `offset` seconds ahead of UTC, less than a day.
struct PartOfTime {
  int64_t part;
  int64_t per_second;
  int64_t offset;

  RECIS_HD int64_t operator()(int64_t time) const {
    int64_t day = time;
    int64_t second = 0;
    if (per_second != 0) {
      const int64_t seconds = floor_div(time, per_second);
      day = floor_div(seconds, kDaySeconds);
      second = floor_mod(seconds, kDaySeconds);
    }
    // Whole cycles are subtracted before anything is added, so that nothing overflows.
    const int64_t cycle = floor_div(day, kCycleDays);
    second += offset;
    day = floor_mod(day, kCycleDays) + floor_div(second, kDaySeconds);
    second = floor_mod(second, kDaySeconds);
    switch (static_cast<TimePart>(part)) {
      case TimePart::kSecond:
        return second % 60;
      case TimePart::kMinute:
        return second / 60 % 60;
      case TimePart::kHour:
        return second / 3600;
      case TimePart::kDayOfWeek:
        return (day + kCycleDays + 3) % 7;  // 1970-01-01 was a Thursday
      case TimePart::kIsWeekend:
        return (day + kCycleDays + 3) % 7 >= 5 ? 1 : 0;
      default:
        return of_calendar(day, cycle);
    }
  }

  // Parts of a date. Years start in March, so that a leap day is the last day of its year (Hinnant: chrono-compatible
  // low-level date algorithms, 2013).
  RECIS_HD int64_t of_calendar(int64_t day, int64_t cycle) const {
    const int64_t since = day + kCycleShift;
    const int64_t era = floor_div(since, kCycleDays);
    const int64_t in_era = floor_mod(since, kCycleDays);
    const int64_t year = (in_era - in_era / 1460 + in_era / 36524 - in_era / 146096) / 365;
    const int64_t in_year = in_era - (365 * year + year / 4 - year / 100);
    const int64_t from_march = (5 * in_year + 2) / 153;
    const int64_t month = from_march < 10 ? from_march + 3 : from_march - 9;
    const int64_t civil = year + (month <= 2 ? 1 : 0);  // within the era
    switch (static_cast<TimePart>(part)) {
      case TimePart::kDayOfMonth:
        return in_year - (153 * from_march + 2) / 5 + 1;
      case TimePart::kMonth:
        return month;
      case TimePart::kYear:
        return civil + 400 * (era + cycle);
      default:
        break;
    }
    // January and February end the year that began in March: 306 days from March to December.
    if (month <= 2) return in_year - 306 + 1;
    const bool leap = civil % 4 == 0 && (civil % 100 != 0 || civil % 400 == 0);
    return in_year + 59 + (leap ? 1 : 0) + 1;
  }
};

// The seconds from one time to another, rounded toward minus infinity and saturated to int64.
struct SecondsBetween {
  int64_t per_second;

  RECIS_HD int64_t operator()(int64_t from, int64_t to) const {
    constexpr int64_t kMost = INT64_MAX;
    if (per_second == 0) {
      const int64_t days = minus(to, from);
      if (days > kMost / kDaySeconds) return kMost;
      if (days < INT64_MIN / kDaySeconds) return INT64_MIN;
      return days * kDaySeconds;
    }
    // With one unit per second nothing is borrowed; with more, the difference is far from the limits of int64.
    const int64_t borrow = floor_mod(to, per_second) < floor_mod(from, per_second) ? 1 : 0;
    return minus(floor_div(to, per_second), floor_div(from, per_second)) - borrow;
  }

  // x - y, saturated; computed in unsigned arithmetic, which wraps.
  RECIS_HD static int64_t minus(int64_t x, int64_t y) {
    const int64_t wrapped = static_cast<int64_t>(static_cast<uint64_t>(x) - static_cast<uint64_t>(y));
    const bool over = ((x ^ y) & (x ^ wrapped)) < 0;
    return !over ? wrapped : x < 0 ? INT64_MIN : INT64_MAX;
  }
};

}  // namespace recis
