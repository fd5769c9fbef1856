// gert::Shape. Where CANN reads or writes past the dimensions in silence, this throws: the caller forgot a check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace gert {

class Shape {
 public:
  static constexpr size_t kMaxDimNum = 25;

  Shape() = default;
  Shape(const std::initializer_list<int64_t>& args) {
    for (const int64_t dim : args) AppendDim(dim);
  }
  bool operator==(const Shape& rht) const {
    if (dim_num_ != rht.dim_num_) return false;
    for (size_t i = 0; i < dim_num_; i++)
      if (dims_[i] != rht.dims_[i]) return false;
    return true;
  }
  bool operator!=(const Shape& rht) const { return !(*this == rht); }
  int64_t GetShapeSize() const {
    int64_t size = 1;
    for (size_t i = 0; i < dim_num_; i++) {
      if (__builtin_mul_overflow(size, dims_[i], &size)) return INT64_MIN;
    }
    return size;
  }
  bool IsScalar() const { return dim_num_ == 0; }
  void SetScalar() { dim_num_ = 0; }
  size_t GetDimNum() const { return dim_num_; }
  void SetDimNum(size_t dim_num) {
    if (dim_num > kMaxDimNum) throw std::out_of_range("Shape::SetDimNum(" + std::to_string(dim_num) + "): at most 25");
    for (size_t i = dim_num_; i < dim_num; i++) dims_[i] = 0;
    dim_num_ = dim_num;
  }
  int64_t GetDim(size_t idx) const { return dims_[Checked(idx)]; }
  const int64_t& operator[](size_t idx) const { return dims_[Checked(idx)]; }
  int64_t& operator[](size_t idx) { return dims_[Checked(idx)]; }
  void SetDim(size_t idx, int64_t dim_value) { dims_[Checked(idx)] = dim_value; }
  Shape& AppendDim(int64_t value) {
    SetDimNum(dim_num_ + 1);
    dims_[dim_num_ - 1] = value;
    return *this;
  }

 private:
  size_t Checked(size_t index) const {
    if (index >= dim_num_) {
      throw std::out_of_range("dimension " + std::to_string(index) + " of a shape with " + std::to_string(dim_num_) +
                              ": check GetDimNum first (SetDimNum before SetDim)");
    }
    return index;
  }
  size_t dim_num_ = 0;
  int64_t dims_[kMaxDimNum] = {};
};

}  // namespace gert
